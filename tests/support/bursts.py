"""A daemon that adapts by itself to a burst: its settings, a profile that is given, and the traffic.

The profile says when a change pays, so what is right does not depend on the machine that runs the test: a decoder takes
the less time for a token the more threads its stage has, and more stages serve more, each request slower.
"""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from flexpiped.config_file import load_config
from flexpiped.engine_factory import find_files
from flexpiped.models import model_source
from flexpiped.profiles import ProfileStore, cpu_name, model_digest, profile_folder
from planner.profile import Fit, Profile, ProfileKey
from planner.profile_terms import TOKEN_SPANS, Term
from tests.support.daemon import Daemon, started, write_config
from topology.device import DeviceKind

AUTO = """
workload = { prompt_tokens = 8, output_tokens = 8 }
[auto]
mode = "on"
interval_s = 0.25
windows_s = [2.0, 4.0]
cv_window_s = 4.0
latency_window_s = 5.0
alpha = 0.2
min_gain = 0.1
confirm_s = 0.5
dwell_s = 1.0
cool_down_s = 0.5
guard_s = 1.0
guard_tolerance = 10.0
"""
TOKENS = 8
PROMPT = list(range(10, 22))  # a shorter one would be served so fast, by the profile, that the burst is none
CALM_PER_S, BURST_PER_S = 2.0, 11.0


def keep_profile(config: Path, state: Path, *, cores: int, token_s: Mapping[int, float]) -> None:
    """Write a profile in which a decoder takes ``token_s`` for a token, by the threads of its stage."""
    settings = load_config(config)
    graph = find_files(settings, source=model_source(settings)).graph
    fits = tuple(
        Fit(
            threads=threads,
            beside_others=False,
            seconds=dict.fromkeys(Term, 0.0) | _per_token(each_s),
            residuals=(0.0,),
        )
        for threads, each_s in token_s.items()
    )
    profile = Profile(
        key=ProfileKey(
            model=model_digest(graph),
            dtype=graph.dtype,
            engine=settings.engine.value,
            device_kind=DeviceKind.CPU,
            device_name=cpu_name(),
            cores=cores,
            torch_version="given",
        ),
        model_name="given",
        measured_at="2026-01-01 00:00 UTC",
        decoder_weight_bytes=graph.decoders[0].weight_bytes,
        fits=fits,
    )
    ProfileStore(folder=profile_folder({"STATE_DIRECTORY": str(state)}, home=state)).save(profile)


def _per_token(token_s: float) -> dict[Term, float]:
    return {Term.DECODER_CALL: token_s} | {term: token_s for term, _, _ in TOKEN_SPANS}


class Traffic:
    """Requests at a rate that a test changes; every answer is kept."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.rate_per_s = CALM_PER_S
        self.answers: list[asyncio.Task[tuple[int, Any]]] = []
        self._http, self._url = http, f"{url}/completions"

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        due_s = clock()
        while True:
            self.answers.append(asyncio.create_task(self._ask(len(self.answers))))
            due_s += 1 / self.rate_per_s  # when it is late, the next one is not: the rate is what the test says
            await asyncio.sleep(due_s - clock())

    async def _ask(self, seed: int) -> tuple[int, Any]:
        body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.8, "seed": seed}
        async with self._http.post(self._url, json=body) as answer:
            return answer.status, await answer.json()


async def until_stages(daemon: Daemon, count: int, *, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while len((await daemon.ask("/status"))["stages"]) != count:  # noqa: ASYNC110  another process
            await asyncio.sleep(0.1)


async def there_and_back(daemon: Daemon, *, fewer: int, more: int, within_s: float) -> list[dict[str, Any]]:
    """Have a burst change the layout, and calm change it back, with no request failed; return all decisions.

    Ranks that stay may begin with more stages than are right in calm: then the first change is to fewer.
    """
    async with aiohttp.ClientSession() as http:
        traffic = Traffic(http, (await daemon.ask("/status"))["api_url"])
        running = asyncio.create_task(traffic.run())
        await until_stages(daemon, fewer, within_s=within_s)
        traffic.rate_per_s = BURST_PER_S
        await until_stages(daemon, more, within_s=within_s)
        traffic.rate_per_s = CALM_PER_S
        await until_stages(daemon, fewer, within_s=within_s)
        running.cancel()
        answers = await asyncio.gather(*traffic.answers)
    assert {status for status, _answer in answers} == {200}
    return await decisions_of(daemon)


async def decisions_of(daemon: Daemon) -> list[dict[str, Any]]:
    """Return what ``flexctl decisions`` has."""
    code, out, err = await daemon.flexctl("decisions", "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def check_decisions(decisions: list[dict[str, Any]], *, fewer: int, more: int, begins_with: int) -> None:
    """There and back, for the reasons that are right, and nothing else."""
    changes = [each for each in decisions if each["fields"]["verb"] != "keep"]
    there, back = f"{fewer} -> {more} stages: load ", f"{more} -> {fewer} {'stage' if fewer == 1 else 'stages'}: CV "
    right = [there, back] if begins_with == fewer else [back, there, back]
    assert len(changes) == len(right), [each["message"] for each in changes]
    assert all(each["message"].startswith(words) for each, words in zip(changes, right, strict=True)), changes
    assert changes[-2]["fields"]["numbers"]["load"] > 0.9
    assert all(each["message"].startswith("keep: ") for each in decisions if each not in changes)


async def changes_on_ranks_that_stay(folder: Path, *, engine: str, ranks: int, more: str) -> None:
    """Have a daemon whose engine has so many ranks go from two stages to all of them in a burst, and back in calm.

    Two stages of two threads serve about 8 of these requests a second, four stages about 12.
    """
    more = f'dtype = "float32"\ndevices.cpu_count = {ranks}\n{more}'
    config = write_config(folder, engine=engine, stages=ranks, more=more)
    keep_profile(config, folder / "state", cores=ranks, token_s={1: 2.8e-3, 2: 2e-3})
    async with started(folder, ready=True, engine=engine, stages=ranks, more=more) as daemon:
        before = await daemon.ask("/status")
        assert len(before["stages"]) == ranks
        decisions = await there_and_back(daemon, fewer=2, more=ranks, within_s=180)
        check_decisions(decisions, fewer=2, more=ranks, begins_with=ranks)
        assert (await daemon.ask("/status"))["epoch"] == before["epoch"] + 3
