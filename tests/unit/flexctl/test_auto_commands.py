"""``flexctl auto``, ``decisions`` and ``status`` as processes, against the control loop with the fake engine."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest

from engines.fake import FakeEngine
from flexpiped.auto import AutoControl
from flexpiped.events import EventLog
from flexpiped.load_monitor import LoadSampler
from flexpiped.refactoring import Refactorings
from flexpiped.settings import AutoMode
from planner.errors import NoFeasiblePlan
from tests.support.admin import admin_status, serving_admin
from tests.support.clock import Clock
from tests.support.layouts import EvenResolver, even_pipeline
from tests.support.until import until
from tests.unit.flexctl.test_command_line import ROOT, Ran, flexctl
from tests.unit.test_auto import SETTINGS, Given

pytestmark = pytest.mark.real_loop
WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoStand:
    socket: Path
    engine: FakeEngine
    events: EventLog
    clock: Clock
    load: LoadSampler
    given: Given
    control: AutoControl

    async def run(self, *arguments: str) -> Ran:
        return await flexctl(*arguments, "--socket", str(self.socket))

    async def overloaded(self) -> None:
        """Have it decide under more than two stages can serve."""
        for index in range(400):
            self.clock.now_s += 30 / 400
            self.load.arrived(index)
            self.load.first_token(index)
            self.load.ended(index, prompt_tokens=10, output_tokens=1, tpot_s=None)
        await self.control.cycle()

    async def kept(self, reason: str) -> None:
        """Have it decide where nothing can be planned."""
        self.given.error = NoFeasiblePlan(reason)
        await self.control.cycle()
        self.given.error = None


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[AutoStand]:
    engine, clock, given, events = FakeEngine(pipeline=even_pipeline(2)), Clock(), Given(), EventLog()
    await engine.start(on_progress=lambda _: None)
    load = LoadSampler(clock=clock)
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=events, monotonic_clock=clock)
    control = AutoControl(
        replace(SETTINGS, mode=AutoMode.OFF),
        engine=lambda: engine,
        load=load,
        candidates=given,
        refactorings=refactorings,
        decided=EventLog(),
        clock=clock,
    )
    status = admin_status(lambda: engine, refactorings=refactorings, auto=control)
    async with serving_admin(tmp_path, status, events=events, refactorings=refactorings, auto=control):
        yield AutoStand(
            socket=tmp_path / "admin.sock",
            engine=engine,
            events=events,
            clock=clock,
            load=load,
            given=given,
            control=control,
        )
    await engine.close()


async def test_auto_on_and_dry_run_take_effect_and_are_told(stand: AutoStand) -> None:
    on = await stand.run("auto", "on")
    assert (on.code, on.out, on.err) == (0, "auto on: the number of stages follows the traffic\n", "")
    assert stand.control.mode is AutoMode.ON
    await stand.overloaded()
    await until(lambda: stand.control.is_settled)
    assert stand.engine.pipeline.granularity == 4

    dry = await stand.run("auto", "dry-run")
    assert (dry.code, dry.out) == (0, "auto dry-run: decisions are shown, and nothing changes\n")
    as_json = await stand.run("auto", "dry-run", "--json")
    assert (as_json.code, json.loads(as_json.out)) == (0, {"mode": "dry-run", "before": "dry-run"})
    assert stand.control.mode is AutoMode.DRY_RUN
    told = [each.message for each in stand.events.since(0) if each.message.startswith("auto ")]
    assert told == ["auto on: it was off", "auto dry-run: it was on"]  # what changes nothing is no event


async def test_another_mode_is_refused(stand: AutoStand) -> None:
    ran = await stand.run("auto", "maybe")
    assert (ran.code, "invalid choice: 'maybe'" in ran.err) == (2, True)

    connector = aiohttp.UnixConnector(path=str(stand.socket))
    async with aiohttp.ClientSession("http://flexpiped", connector=connector) as http:
        for body in ({"mode": "maybe"}, {}, {"mode": "on", "more": 1}):
            async with http.post("/auto", json=body) as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (400, "bad_request")
        assert stand.control.mode is AutoMode.OFF
        async with http.post("/auto", json={"mode": "on"}) as answer:
            assert (answer.status, await answer.json()) == (200, {"mode": "on", "before": "off"})
    assert stand.control.mode is AutoMode.ON


async def test_decisions_are_lines_with_their_reasons_and_what_a_dry_run_would_have_done_is_marked(
    stand: AutoStand,
) -> None:
    stand.control.set_mode(AutoMode.DRY_RUN)
    await stand.overloaded()
    await stand.kept("nothing fits")

    plain, later, as_json = await asyncio.gather(
        stand.run("decisions"), stand.run("decisions", "--since", "1"), stand.run("decisions", "--json")
    )

    assert (plain.code, plain.err) == (0, "")
    change, keep = plain.out.splitlines()
    assert re.fullmatch(rf"{WHEN}  \(dry run\) 2 -> 4 stages: load .+", change)
    assert re.fullmatch(rf"{WHEN}  keep: nothing fits", keep)
    assert (later.code, later.out.splitlines()) == (0, [keep])
    found = [json.loads(line) for line in as_json.out.splitlines()]
    assert [each["fields"]["verb"] for each in found] == ["change", "keep"]
    assert found[0]["fields"]["numbers"]["load"] > 0.9


async def test_where_nothing_was_decided_it_says_so(stand: AutoStand) -> None:
    plain, as_json = await asyncio.gather(stand.run("decisions"), stand.run("decisions", "--json"))

    assert (plain.code, plain.out) == (0, "no decisions; they are made while flexctl auto is on or dry-run\n")
    assert (as_json.code, as_json.out) == (0, "")


async def test_what_is_carried_out_is_not_marked(stand: AutoStand) -> None:
    stand.control.set_mode(AutoMode.ON)
    await stand.overloaded()
    await until(lambda: stand.control.is_settled)

    [line] = (await stand.run("decisions")).out.splitlines()

    assert re.fullmatch(rf"{WHEN}  2 -> 4 stages: load .+", line)


async def test_follow_goes_on_with_what_is_decided_until_the_daemon_ends(stand: AutoStand) -> None:
    stand.control.set_mode(AutoMode.DRY_RUN)
    await stand.kept("before")
    await stand.kept("first")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpiped.flexctl", "decisions", "--follow", "--since", "1"),
        *("--socket", str(stand.socket)),
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        assert (await process.stdout.readline()).endswith(b"  keep: first\n")
        for reason in ("second", "third"):
            await stand.kept(reason)
            assert (await process.stdout.readline()).endswith(f"  keep: {reason}\n".encode())
        stand.control.decided.close()
        assert (await process.stdout.read(), await process.wait()) == (b"", 0)


async def test_status_shows_the_last_decision(stand: AutoStand) -> None:
    off = await stand.run("status")
    assert "auto off" in off.out.splitlines()[0]
    assert "decision" not in off.out

    stand.control.set_mode(AutoMode.DRY_RUN)
    await stand.overloaded()
    shown = await stand.run("status")

    assert "auto dry-run" in shown.out.splitlines()[0]
    [line] = [each for each in shown.out.splitlines() if each.startswith("decision ")]
    assert re.fullmatch(r"decision       2 -> 4 stages: load .+   \(auto dry-run\)", line)
