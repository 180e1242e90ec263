"""What a step of the native engine takes, by part: in the stage worker, between steps, and on the way to the client."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.checkpoint import open_checkpoint
from engines.native.adapter import NativeEngine
from planner.layout import Pipeline, pipeline_of
from tests.bench import direct
from tests.bench.daemon_process import DaemonProcess
from tests.bench.http_client import HttpClient
from tests.bench.processes import cpu_s
from tests.bench.program import DEVICES, EngineSetup, prompts
from tests.bench.tables import say


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The mean over all steps of one batch of streams. A step's time is that from its dispatch to the next one's."""

    what: str
    step_s: float
    parts_s: Mapping[str, float]  # of the stage worker, by name
    rest_s: float  # of the stage worker, beside these
    between_s: float  # scheduling, messages, and results on their way
    cpu_s: Mapping[str, float]  # for each token over HTTP, by process

    def to_wire(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


async def profile_of(
    model: Path,
    setup: EngineSetup,
    server: DaemonProcess,
    client: HttpClient,
    points: Sequence[tuple[int, int]],
    *,
    max_tokens: int,
) -> list[Profile]:
    """Profile one stage at each point, a length of prompts and a number of streams."""
    profiles = []
    async with direct.running(direct.options_for(model, setup), _whole(model)) as engine:
        for number, (length, streams) in enumerate(points):
            what = f"prompts of {length}, {streams} streams"
            given = [prompts(count=streams, length=length, seed=10_000 + 10 * number + i) for i in range(3)]
            await direct.complete(engine, given[0], max_tokens=max_tokens)
            shares = await _steps(engine, given[1], max_tokens=max_tokens)
            costs = await _costs(server, client, given[2], max_tokens=max_tokens)
            profiles.append(Profile(what=what, cpu_s=costs, **shares))
            say(f"profiled {what}")
    return profiles


async def _steps(engine: NativeEngine, given: list[list[int]], *, max_tokens: int) -> dict[str, Any]:
    await engine.trace()
    await engine.stage_steps()
    load = await direct.complete(engine, given, max_tokens=max_tokens)
    (parts,) = (await engine.stage_steps()).parts_s
    steps = len((await engine.trace()).ends_s)
    busy_s = parts.pop("all")
    return {
        "step_s": (load.ended_s - load.started_s) / steps,
        "parts_s": {name: seconds / steps for name, seconds in parts.items()},
        "rest_s": (busy_s - sum(parts.values())) / steps,
        "between_s": (load.ended_s - load.started_s - busy_s) / steps,
    }


async def _costs(
    server: DaemonProcess, client: HttpClient, given: list[list[int]], *, max_tokens: int
) -> dict[str, float]:
    pids = server.pids()
    roles = {
        "client": (client.pid,),
        "daemon": (pids.daemon,),
        "text": pids.text,
        "core": pids.core,
        "workers": pids.workers,
    }
    before = {role: cpu_s(each) for role, each in roles.items()}
    load = await client.run(server.url, given, max_tokens=max_tokens)
    return {role: (cpu_s(each) - before[role]) / load.tokens for role, each in roles.items()}


def _whole(model: Path) -> Pipeline:
    """Return the pipeline of one stage."""
    decoders = int(open_checkpoint(model).config["num_hidden_layers"])
    return pipeline_of(device_ids=DEVICES[:1], cuts=[], num_decoders=decoders)
