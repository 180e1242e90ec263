"""Memory and idleness: PSS of the engine's processes before and after moves, under streams and idle, and idle CPU.

Layouts 1 -> 2 -> 4 -> 8 -> 4 -> 2 -> 1 while streams run. A worker that lost its stage gives its weights and KV memory
back, so that the end looks like the beginning. PSS counts shared pages once over all processes.
"""

import argparse
import asyncio
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engines.native.adapter import NativeEngine
from tests.bench import direct
from tests.bench.processes import ROOT, cpu_s, pss_bytes
from tests.bench.program import checkpoint, even, parser, prompts, run, setup_of
from tests.bench.rigs import longest_output
from tests.bench.tables import Bound, mib, say, table, verdicts, write_json

LAYOUTS = (1, 2, 4, 8, 4, 2, 1)
_GIB = 1 << 30
_SETTLE_S = 0.5
_BOUND_RETURNED = 1.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Memory at one moment, in bytes."""

    moment: str
    core_pss: int
    worker_pss: tuple[int, ...]
    weights: int
    kv_mapped: int
    returned: int = 0  # as retire reported it

    @property
    def all_pss(self) -> int:
        return self.core_pss + sum(self.worker_pss)


def _options() -> argparse.Namespace:
    made = parser("Measure memory and idle CPU of the engine.")
    made.add_argument("--bench-model", action="store_true", help="serve the benchmarks' Llama, not the demo model")
    made.add_argument("--streams", type=int, default=8, help="streams that run while the layout changes")
    made.add_argument("--prompt-tokens", type=int, default=256, help="length of the prompts")
    made.add_argument("--idle-s", type=float, default=10.0, help="how long idle CPU time is counted")
    options = made.parse_args()
    if options.short:
        options.idle_s, options.prompt_tokens = 2.0, 64
    return options


def _model(options: argparse.Namespace) -> Path:
    if options.bench_model or options.checkpoint:
        return checkpoint(options)
    return ROOT / "etc" / "demo-model"


async def _read(engine: NativeEngine, moment: str, returned: int = 0) -> Reading:
    stages = await engine.stages()
    pss = await asyncio.to_thread(lambda: [pss_bytes([pid]) for pid in (engine.core_pid, *engine.worker_pids)])
    reading = Reading(
        moment=moment,
        core_pss=pss[0],
        worker_pss=tuple(pss[1:]),
        weights=sum(stage.weights_bytes for stage in stages),
        kv_mapped=sum(stage.kv_mapped_bytes for stage in stages),
        returned=returned,
    )
    say(f"{moment}: {mib(reading.all_pss)} MiB")
    return reading


async def _idle_share(engine: NativeEngine, length_s: float) -> float:
    """Return the CPU time of all engine processes over wall time while nothing is asked of them."""
    await asyncio.sleep(_SETTLE_S)
    pids = (engine.core_pid, *engine.worker_pids)
    before_s = cpu_s(pids)
    await asyncio.sleep(length_s)
    share = (cpu_s(pids) - before_s) / length_s
    say(f"idle at {engine.pipeline.granularity} stages: {share:.2%} of a core")
    return share


def _streams(engine: NativeEngine, options: argparse.Namespace) -> direct.HeldStreams:
    given = prompts(count=options.streams, length=options.prompt_tokens, seed=0)
    fitting = [[token % engine.capabilities.vocab_size for token in prompt] for prompt in given]
    longest = min(longest_output(options.streams, options.prompt_tokens), engine.capabilities.max_model_len // 2)
    return direct.HeldStreams(fitting, max_tokens=longest)


async def _moves(engine: NativeEngine, options: argparse.Namespace) -> list[Reading]:
    """Move through all layouts while streams run; read before and after each move, and before all of them."""
    stays = (LAYOUTS[0], *LAYOUTS)  # the first is no move: it shows what the streams alone leave behind
    readings = []
    for before, after in pairwise(stays):
        streams = _streams(engine, options)
        await streams.start(engine, warm_tokens=16)
        readings.append(await _read(engine, f"{before} stages, {options.streams} streams"))
        reports = await direct.move(engine, even(after)) if after != before else []
        await streams.stop()
        await engine.drain()
        await asyncio.sleep(_SETTLE_S)
        moment = f"moved {before} -> {after}, streams ended" if reports else f"{before} stages, streams ended"
        readings.append(await _read(engine, moment, reports[-1].returned_bytes if reports else 0))
    return readings


def _row(reading: Reading) -> list[str]:
    holding = " ".join(f"{pss / 2**20:.0f}" for pss in reading.worker_pss)
    return [
        reading.moment,
        mib(reading.core_pss),
        mib(sum(reading.worker_pss)),
        mib(reading.all_pss),
        mib(reading.weights),
        mib(reading.kv_mapped),
        mib(reading.returned) if reading.returned else "",
        holding,
    ]


def _bounds(readings: list[Reading], idle: dict[int, float]) -> list[Bound]:
    first, last = readings[2], readings[-1]  # at one stage with the streams ended, before all moves and after
    idle_bounds = [
        Bound(what=f"idle CPU, {stages} stages, core and workers", value=share * 100, limit=1.0, at_most=True, unit="%")
        for stages, share in idle.items()
    ]
    return [
        Bound(
            what="largest PSS of core and workers",
            value=max(reading.all_pss for reading in readings) / _GIB,
            limit=2.0,
            at_most=True,
            unit="GiB",
        ),
        Bound(
            what="PSS at one stage after all moves / before them",
            value=last.all_pss / first.all_pss,
            limit=_BOUND_RETURNED,
            at_most=True,
        ),
        *idle_bounds,
    ]


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(_model, options)
    idle: dict[int, float] = {}
    async with direct.running(direct.options_for(model, setup_of(options)), even(LAYOUTS[0])) as engine:
        idle[1] = await _idle_share(engine, options.idle_s)
        readings = [await _read(engine, "idle after the start, 1 stage")]
        readings += await _moves(engine, options)
        await direct.move(engine, even(8))
        idle[8] = await _idle_share(engine, options.idle_s)
    head = ["MiB", "core PSS", "workers PSS", "all", "weights", "KV mapped", "returned", "PSS of each worker"]
    table(f"memory, model {model.name}", head, [_row(reading) for reading in readings])
    bounds = _bounds(readings, idle)
    verdicts(bounds)
    raw: dict[str, Any] = {"readings": [asdict(reading) for reading in readings], "idle_share": idle}
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
