"""The real ``flexctl`` as a process, against a real admin socket with the fake engine behind it."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.admin import AdminStand, admin_stand, replica_stand
from tests.support.until import until
from topology.units import MIB

pytestmark = pytest.mark.real_loop

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    code: int
    out: str
    err: str


async def flexctl(*arguments: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpiped.flexctl", *arguments),
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(code=process.returncode, out=out.decode(), err=err.decode())


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[AdminStand]:
    async with admin_stand(tmp_path) as stand:
        yield stand


async def test_status(stand: AdminStand) -> None:
    plain, as_json = await asyncio.gather(
        flexctl("status", "--socket", str(stand.socket)), flexctl("--socket", str(stand.socket), "--json", "status")
    )

    assert (plain.code, plain.err) == (0, "")
    assert plain.out.startswith("demo   fake   epoch 0   2 stages")
    assert "\x1b" not in plain.out
    assert (as_json.code, json.loads(as_json.out)["state"]) == (0, "ready")


async def test_rebalance_and_wait_has_one_line_for_each_phase(stand: AdminStand) -> None:
    ran = await flexctl("rebalance", "--stages", "4", "--wait", "--socket", str(stand.socket))

    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    words = [line.split()[0] for line in ran.out.splitlines() if not line.startswith(" ")]
    assert words == ["plan", "prepare", "sync", "commit", "retire", "done"]
    assert ran.out.startswith("plan     2 -> 4 stages: decoder 2 cpu:0 -> cpu:1, ")


async def test_rebalance_with_json_gives_every_event(stand: AdminStand) -> None:
    ran = await flexctl("rebalance", "--stages", "4", "--wait", "--json", "--socket", str(stand.socket))

    events = [json.loads(line) for line in ran.out.splitlines()]
    assert (ran.code, events[-1]["fields"]["record"]["result"]) == (0, "done")


async def test_without_wait_it_says_how_to_follow(stand: AdminStand) -> None:
    ran = await flexctl("rebalance", "--stages", "4", "--socket", str(stand.socket))

    assert ran.code == 0
    assert "started handover #1; follow it: flexctl events --follow" in ran.out


async def test_a_dry_run_and_nothing_to_do(stand: AdminStand) -> None:
    dry, same = await asyncio.gather(
        flexctl("rebalance", "--stages", "4", "--dry-run", "--socket", str(stand.socket)),
        flexctl("rebalance", "--stages", "2", "--wait", "--socket", str(stand.socket)),
    )

    assert (dry.code, dry.out.splitlines()[-1]) == (0, "dry run: nothing was moved")
    assert (same.code, same.out) == (0, "nothing to do: this layout is in force already\n")


async def test_an_engine_that_cannot_be_had_is_refused(stand: AdminStand) -> None:
    other, same, unknown = await asyncio.gather(
        flexctl("rebalance", "--engine", "vllm", "--wait", "--socket", str(stand.socket)),
        flexctl("rebalance", "--engine", "native", "--stages", "2", "--dry-run", "--socket", str(stand.socket)),
        flexctl("rebalance", "--engine", "other", "--socket", str(stand.socket)),
    )

    assert (other.code, other.err) == (4, "refused: no engine 'vllm' can take the place of the one in force\n")
    assert same.code == 4
    assert (unknown.code, "invalid choice: 'other'" in unknown.err) == (2, True)


async def test_a_layout_file_is_sent_as_text(stand: AdminStand, tmp_path: Path) -> None:
    (tmp_path / "layout").write_text("1")
    (tmp_path / "wrong").write_text("one")

    good, wrong, missing = await asyncio.gather(
        flexctl("rebalance", "--layout", str(tmp_path / "layout"), "--dry-run", "--socket", str(stand.socket)),
        flexctl("rebalance", "--layout", str(tmp_path / "wrong"), "--socket", str(stand.socket)),
        flexctl("rebalance", "--layout", str(tmp_path / "none"), "--socket", str(stand.socket)),
    )

    assert good.code == 0
    assert (wrong.code, wrong.err) == (4, "refused: a layout of this test is a number\n")
    assert (missing.code, missing.err.endswith("none: No such file or directory\n")) == (2, True)


async def test_what_is_infeasible_is_refused(stand: AdminStand) -> None:
    plain = await flexctl("rebalance", "--stages", "9", "--wait", "--socket", str(stand.socket))
    as_json = await flexctl("rebalance", "--stages", "9", "--json", "--socket", str(stand.socket))

    assert (plain.code, plain.out) == (4, "")
    assert plain.err == "refused: the model has 8 decoder layers, so at most as many stages\n"
    assert (as_json.code, json.loads(as_json.out)["error"]["code"]) == (4, "infeasible")


async def test_busy_is_refused_and_a_cancelled_one_failed(stand: AdminStand) -> None:
    stand.engine.hold_refactoring()
    waiting = asyncio.create_task(flexctl("rebalance", "--stages", "4", "--wait", "--socket", str(stand.socket)))
    await until(lambda: "prepare" in (stand.refactorings.under_way or ""))

    busy = await flexctl("rebalance", "--stages", "1", "--socket", str(stand.socket))
    assert busy.code == 4
    assert busy.err.startswith("refused: busy: handover #1, 2 -> 4 stages, is in phase prepare")

    cancelled = await flexctl("rebalance", "--cancel", "--socket", str(stand.socket))
    assert (cancelled.code, cancelled.out.startswith("rolling back: handover #1")) == (0, True)
    ended = await waiting
    assert (ended.code, ended.out.splitlines()[-1].startswith("aborted: cancelled before commit")) == (1, True)
    assert (await flexctl("rebalance", "--cancel", "--socket", str(stand.socket))).code == 4


async def test_an_engine_that_dies_is_a_failure(stand: AdminStand) -> None:
    stand.engine.kill("killed by a test")

    ran = await flexctl("rebalance", "--stages", "4", "--socket", str(stand.socket))
    assert (ran.code, ran.err) == (1, "flexctl: killed by a test\n")


async def test_events(stand: AdminStand) -> None:
    await flexctl("rebalance", "--stages", "4", "--wait", "--socket", str(stand.socket))

    ran = await flexctl("events", "--since", "1", "--socket", str(stand.socket))

    assert ran.code == 0
    assert len(ran.out.splitlines()) == 6
    assert "refactoring #1    fake prepare" in ran.out.splitlines()[0]


async def test_no_daemon_is_not_reachable(tmp_path: Path) -> None:
    socket = tmp_path / "admin.sock"
    plain, as_json = await asyncio.gather(
        flexctl("status", "--socket", str(socket)), flexctl("status", "--json", "--socket", str(socket))
    )

    assert (plain.code, plain.out) == (3, "")
    assert plain.err == (
        f"flexctl: no daemon at {socket} (no such file). Start it: systemctl start flexpiped, or make run.\n"
    )
    assert (as_json.code, json.loads(as_json.out)["error"]["code"]) == (3, "not_reachable")


@pytest.mark.parametrize(
    "arguments",
    [(), ("rebalance", "--stages", "0"), ("rebalance", "--stages", "2", "--cancel"), ("stats",)],
)
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    ran = await flexctl(*arguments)

    assert ran.code == 2
    assert ran.err.startswith("usage: flexctl")


async def test_more_ranks_than_are_resident_take_a_second_instance(tmp_path: Path) -> None:
    async with replica_stand(tmp_path) as stand:
        socket = str(stand.socket)
        dry = await flexctl("rebalance", "--stages", "4", "--dry-run", "--socket", socket)
        ran = await flexctl("rebalance", "--stages", "4", "--wait", "--socket", socket)
        status = await flexctl("status", "--socket", socket)

    assert dry.out.splitlines() == [
        "plan     2 -> 4 stages by replica: by a second instance on cpu:0, cpu:1, cpu:2,",
        "         cpu:3, as 4 stages need as many ranks, 2 are resident",
        "         needs 2.1 of 60 MiB free on cpu:0: 2 MiB weights, 128 KiB KV (0 B live)",
        "         for embedding and 0-1",
        "         needs 2.1 of 60 MiB free on cpu:1: 2 MiB weights, 128 KiB KV (0 B live)",
        "         for 2-3",
        "         needs 2.1 of 64 MiB free on cpu:2: 2 MiB weights, 128 KiB KV (0 B live)",
        "         for 4-5",
        "         needs 2.1 of 64 MiB free on cpu:3: 2 MiB weights, 128 KiB KV (0 B live)",
        "         for 6-7 and head",
        "dry run: nothing was moved",
    ]
    assert ran.code == 0
    took = r"\d[\d.]* m?s"
    assert re.fullmatch(
        r"plan     2 -> 4 stages by replica: by a second instance on .*\n.*\n"
        rf"prepare  second instance: ready   {took}\n"
        rf"sync     no request to take over   {took}\n"
        r"commit   the second instance is in force, epoch 1\n"
        rf"retire   the second instance serves, the first one ends   {took}\n"
        rf"done in {took}, 0 requests went on\n",
        ran.out,
    )
    assert "handover #1    2 -> 4 stages, 0 s ago: by replica, no request to take over" in status.out


async def test_a_second_instance_that_does_not_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    async with replica_stand(tmp_path, memory_bytes=5 * MIB) as stand:
        dry = await flexctl("rebalance", "--stages", "4", "--dry-run", "--socket", str(stand.socket))
        ran = await flexctl("rebalance", "--stages", "4", "--wait", "--socket", str(stand.socket))

    why = (
        "by a second instance on cpu:0, cpu:1, cpu:2, cpu:3, as 4 stages need as many ranks, 2 are resident: "
        "no room beside the first; needs 2.1 of 0.8 MiB free on cpu:0, 1.4 MiB too few: "
    )
    assert (dry.code, " ".join(dry.out.split()).startswith(f"infeasible: {why}")) == (4, True)
    assert (ran.code, ran.err.startswith(f"refused: {why}")) == (4, True)


async def test_a_replica_is_had_for_the_asking_and_cancelled(tmp_path: Path) -> None:
    async with replica_stand(tmp_path, resident_ranks=8) as stand:
        socket = str(stand.socket)
        dry = await flexctl("rebalance", "--stages", "4", "--replica", "--dry-run", "--socket", socket)
        assert "cpu:3, as it was asked for" in dry.out
        stand.may_start.clear()
        waiting = asyncio.create_task(flexctl("rebalance", "--stages", "4", "--replica", "--wait", "--socket", socket))
        await until(lambda: "waiting for the gate" in (stand.refactorings.under_way or ""))
        status = await flexctl("status", "--socket", socket)
        assert "handover #1, 2 -> 4 stages by replica, is in phase prepare (second instance: waiting" in status.out
        cancelled = await flexctl("rebalance", "--cancel", "--socket", socket)
        assert (cancelled.code, cancelled.out.startswith("rolling back: handover #1")) == (0, True)
        ended = await waiting
        in_place = await flexctl("rebalance", "--stages", "4", "--dry-run", "--socket", socket)

    assert ended.code == 1
    assert ended.out.splitlines()[-3:] == [
        "roll back  ending the second instance: cancelled",
        "aborted: the second instance was given up: cancelled; the first instance serves",
        "         on, no request disturbed",
    ]
    assert in_place.out.startswith("plan     2 -> 4 stages: decoder 2 cpu:0 -> cpu:1, ")
