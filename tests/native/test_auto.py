"""The daemon adapts by itself, with the native engine: a burst makes it change the layout where the profile says so.

The profile is given: one stage of two threads serves about 8 of these requests a second, two stages about 12 and each
request slower. So what is right does not depend on the machine that runs the test.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flexpiped.config_file import load_config
from flexpiped.models import model_source
from flexpiped.profiles import ProfileStore, profile_folder, profile_target
from planner.profile import Fit, Profile, ProfileKey, Term
from tests.support.daemon import Daemon, started, write_config
from topology.device import DeviceKind

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

CONFIG = """
devices.cpu_count = 2
engines.native.threads = 2
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


def keep_profile(config: Path, state: Path) -> None:
    """Write a profile in which a decoder takes 1 ms a token on two threads, and 1.4 ms on one."""
    settings = load_config(config)
    target = profile_target(settings, source=model_source(settings))
    fits = tuple(
        Fit(
            threads=threads,
            beside_others=False,
            seconds=dict.fromkeys(Term, 0.0) | per_token(token_s),
            residuals=(0.0,),
        )
        for threads, token_s in ((1, 1.4e-3), (2, 1e-3))
    )
    profile = Profile(
        key=ProfileKey(
            model=target.model_digest,
            dtype=target.dtype,
            engine="native",
            device_kind=DeviceKind.CPU,
            device_name=target.device_name,
            cores=2,
            torch_version="given",
        ),
        model_name=target.model_name,
        measured_at="2026-01-01 00:00 UTC",
        decoder_weight_bytes=target.decoder_weight_bytes,
        fits=fits,
    )
    ProfileStore(folder=profile_folder({"STATE_DIRECTORY": str(state)}, home=state)).save(profile)


def per_token(token_s: float) -> dict[Term, float]:
    return {Term.DECODER_SOME_TOKENS: token_s, Term.DECODER_MANY_TOKENS: token_s}


class Traffic:
    """Requests at a rate that a test changes; every answer is kept."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.rate_per_s = 2.0
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


async def check_decisions(daemon: Daemon) -> None:
    """There and back, for the reasons that are right, and nothing else: as ``flexctl decisions`` has it."""
    code, out, err = await daemon.flexctl("decisions", "--json")
    assert code == 0, err
    decisions = [json.loads(line) for line in out.splitlines()]
    changes = [each for each in decisions if each["fields"]["verb"] != "keep"]
    assert [each["message"][:16] for each in changes] == ["1 -> 2 stages: l", "2 -> 1 stage: CV"]
    assert changes[0]["fields"]["numbers"]["load"] > 0.9
    assert all(each["message"].startswith("keep: ") for each in decisions if each not in changes)


def write_burst(path: Path) -> int:
    """Write a trace of 2 requests/s with a burst of 11/s from second 4 to 24; return how many requests it has."""
    calm, burst, after = (
        (4 * i / 8 for i in range(8)),
        (4 + i / 11 for i in range(220)),
        (24 + i / 2 for i in range(60)),
    )
    arrivals_s = [*calm, *burst, *after]
    wire = ({"timestamp": 1e3 * at_s, "input_length": len(PROMPT), "output_length": TOKENS} for at_s in arrivals_s)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in wire))
    return len(arrivals_s)


@pytest.mark.long
async def test_a_burst_that_flexctl_bench_replays_changes_the_layout_and_no_request_fails(tmp_path: Path) -> None:
    keep_profile(write_config(tmp_path, engine="native", stages=1, more=CONFIG), tmp_path / "state")
    count = write_burst(tmp_path / "burst.jsonl")
    async with started(tmp_path, ready=True, engine="native", stages=1, more=CONFIG) as daemon:
        code, out, err = await daemon.flexctl("bench", "--trace", str(tmp_path / "burst.jsonl"), "--json")
        assert code == 0, out + err
        found = json.loads(out)
        assert (found["requests"], found["failed"], found["failures"]) == (count, 0, {})
        await check_decisions(daemon)


async def test_a_burst_changes_the_layout_and_calm_changes_it_back(tmp_path: Path) -> None:
    keep_profile(write_config(tmp_path, engine="native", stages=1, more=CONFIG), tmp_path / "state")
    async with (
        started(tmp_path, ready=True, engine="native", stages=1, more=CONFIG) as daemon,
        aiohttp.ClientSession() as http,
    ):
        traffic = Traffic(http, (await daemon.ask("/status"))["api_url"])
        running = asyncio.create_task(traffic.run())
        traffic.rate_per_s = 11.0
        await until_stages(daemon, 2, within_s=90)
        traffic.rate_per_s = 2.0
        await until_stages(daemon, 1, within_s=90)
        running.cancel()
        answers = await asyncio.gather(*traffic.answers)
        assert {status for status, _answer in answers} == {200}
        await check_decisions(daemon)
        code, out, _err = await daemon.flexctl("auto", "off")
        assert (code, out.strip()) == (0, "auto off: nothing changes by itself")
        assert (await daemon.ask("/status"))["auto"]["mode"] == "off"
