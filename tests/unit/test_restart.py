"""The real daemon as a process, with the fake engine: after a restart it is what it was last asked to be."""

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.bursts import decisions_of
from tests.support.daemon import Daemon, completed, started, write_config
from tests.support.until import until

pytestmark = pytest.mark.real_loop
SLEEPY = """
auto = { mode = "on", min_replicas = 0, idle_s = 1.0, interval_s = 0.25, windows_s = [1.0, 4.0], cool_down_s = 0.1 }
"""


async def stages_of(daemon: Daemon) -> int:
    return len((await daemon.ask("/status"))["stages"])


async def kill(daemon: Daemon) -> None:
    daemon.process.kill()
    await daemon.process.wait()


async def rebalance_for_ever(daemon: Daemon, rng: random.Random, asked: list[int], answered: list[int]) -> None:
    """Ask for one layout after the other until the daemon is gone; note what was asked for and what was promised."""
    try:
        while True:
            stages = rng.choice([n for n in range(1, 9) if n != (answered or [2])[-1]])
            asked.append(stages)
            answer = await daemon.ask("/rebalance", {"stages": stages})
            if answer.get("state") == "started":
                answered.append(stages)
    except (aiohttp.ClientError, OSError):
        return


async def kills_survived(folder: Path, *, kills: int) -> None:
    rng, intended = random.Random(1), 2
    for _ in range(kills):
        asked: list[int] = []
        answered: list[int] = [intended]
        async with started(folder, ready=True) as daemon:
            assert await stages_of(daemon) == intended
            working = asyncio.create_task(rebalance_for_ever(daemon, rng, asked, answered))
            await asyncio.sleep(rng.uniform(0.0, 0.25))  # the moment is what the test is about
            await kill(daemon)
            await working
        async with started(folder, ready=True) as daemon:
            intended = await stages_of(daemon)
            assert intended in {answered[-1], *asked[-1:]}
            assert stages_intended(await daemon.ask("/history")) in (intended, None)
            await kill(daemon)


def stages_intended(history: dict[str, Any]) -> int | None:
    return None if history["intent"] is None else len(history["intent"]["stages"])


async def test_killed_at_random_moments_it_comes_back_as_it_was_asked_to_be(tmp_path: Path) -> None:
    await kills_survived(tmp_path, kills=2)


@pytest.mark.long
async def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    await kills_survived(tmp_path, kills=40)


async def test_history_goes_over_restarts_and_the_configuration_has_the_last_word(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True) as daemon:
        code, _, said = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
        assert code == 0, said
        await kill(daemon)

    async with started(tmp_path, ready=True) as daemon:
        assert await stages_of(daemon) == 4
        code, shown, _ = await daemon.flexctl("history", "--limit", "100")
        lines = shown.splitlines()
        assert code == 0
        assert any("refactoring #1    plan: 2 -> 4 stages" in line for line in lines)
        assert any("refactoring #1    ended in" in line for line in lines)
        assert any("last layout restored: 4 stages, asked for: 2 -> 4 stages" in line for line in lines)
        assert lines[-1].startswith("a restart begins with 4 stages of fake (asked for: 2 -> 4 stages, ")
        code, shown, said = await daemon.flexctl("history", "--kind", "weather")
        assert (code, "no kind 'weather'" in said) == (4, True)
        daemon.process.terminate()
        await daemon.process.wait()

    write_config(tmp_path, stages=3)
    async with started(tmp_path, ready=True, stages=3) as daemon:
        assert await stages_of(daemon) == 3
        history = await daemon.ask("/history?kind=daemon")
        told = [event["message"] for event in history["events"]]
        assert "last layout not restored: stages was 2 and is 3 in the configuration now" in told
        assert history["intent"] is None


async def test_what_was_decided_is_told_after_a_restart_with_its_reason(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True, more=SLEEPY) as daemon, aiohttp.ClientSession() as http:
        await completed(http, (await daemon.ask("/status"))["api_url"], {"prompt": "Once", "max_tokens": 2})

        async def is_told() -> bool:
            return bool((await daemon.ask("/history?kind=decision"))["events"])

        await until(is_told)
        [decided] = [each for each in await decisions_of(daemon) if each["fields"]["verb"] != "keep"]
        await kill(daemon)

    async with started(tmp_path, ready=True) as daemon:
        code, shown, said = await daemon.flexctl("history", "--kind", "decision", "--json")
        assert code == 0, said
        [told] = json.loads(shown)["events"]
        assert re.fullmatch(r"remove 1 replica of 2 stages: no request for [1-9]\d* s", told["message"])
        assert told["message"] == decided["message"]
        assert told["fields"] == decided["fields"]
        assert told["fields"]["numbers"]["idle_s"] >= 1.0
        code, shown, _ = await daemon.flexctl("history", "--kind", "decision")
        assert re.search(f"decision +{told['message']}", shown), shown
        await kill(daemon)


async def test_all_replicas_come_back_also_after_an_end_in_the_middle_of_that(tmp_path: Path) -> None:
    async with started(tmp_path, ready=True) as daemon:
        code, _, said = await daemon.flexctl("scale", "--replicas", "3", "--stages", "1", "--wait")
        assert code == 0, said
        await kill(daemon)

    for end in ("terminate", "kill"):  # whether or not they are back already
        async with started(tmp_path, ready=True) as daemon:
            getattr(daemon.process, end)()
            await daemon.process.wait()

    async with started(tmp_path, ready=True) as daemon:
        assert [len(each["stages"]) for each in await daemon.replicas_serving(3)] == [2, 1, 1]
        code, shown, _ = await daemon.flexctl("history", "--limit", "100")
        lines = shown.splitlines()
        assert code == 0
        assert any("last layout restored: 3 replicas (2 stages, 1 stage, 1 stage), asked for" in line for line in lines)
        assert lines[-1].startswith("a restart begins with 3 replicas (2 stages, 1 stage, 1 stage) of fake")
        code, _, said = await daemon.flexctl("scale", "--replicas", "2", "--on", "3", "--wait")
        assert code == 0, said
        await kill(daemon)

    async with started(tmp_path, ready=True) as daemon:
        assert [len(each["stages"]) for each in await daemon.replicas_serving(2)] == [2, 1]
