"""The real ``flexctl`` as a process, against a real admin socket with the fake engine behind it."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.admin import AdminStand, admin_stand
from tests.support.until import until

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
    words = [line.split()[0] for line in ran.out.splitlines()]
    assert words == ["plan", "prepare", "sync", "commit", "retire", "done"]
    assert ran.out.startswith("plan     2 -> 4 stages: decoder 2 cpu:0 -> cpu:1, ")


async def test_rebalance_with_json_gives_every_event(stand: AdminStand) -> None:
    ran = await flexctl("rebalance", "--stages", "4", "--wait", "--json", "--socket", str(stand.socket))

    events = [json.loads(line) for line in ran.out.splitlines()]
    assert (ran.code, events[-1]["fields"]["record"]["result"]) == (0, "done")


async def test_without_wait_it_says_how_to_follow(stand: AdminStand) -> None:
    ran = await flexctl("rebalance", "--stages", "4", "--socket", str(stand.socket))

    assert ran.code == 0
    assert "started handover #1; to follow it: flexctl events --follow" in ran.out


async def test_a_dry_run_and_nothing_to_do(stand: AdminStand) -> None:
    dry, same = await asyncio.gather(
        flexctl("rebalance", "--stages", "4", "--dry-run", "--socket", str(stand.socket)),
        flexctl("rebalance", "--stages", "2", "--wait", "--socket", str(stand.socket)),
    )

    assert (dry.code, dry.out.splitlines()[-1]) == (0, "dry run: nothing was moved")
    assert (same.code, same.out) == (0, "nothing to do: this layout is in force already\n")


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
    plain, as_json = await asyncio.gather(
        flexctl("rebalance", "--stages", "9", "--wait", "--socket", str(stand.socket)),
        flexctl("rebalance", "--stages", "9", "--json", "--socket", str(stand.socket)),
    )

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
    [(), ("rebalance",), ("rebalance", "--stages", "0"), ("rebalance", "--stages", "2", "--cancel"), ("stats",)],
)
async def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    ran = await flexctl(*arguments)

    assert ran.code == 2
    assert ran.err.startswith("usage: flexctl")
