"""``flexctl top`` with its pilot, against a real admin socket with the fake engine behind it."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.containers import VerticalScroll
from textual.widgets import RichLog, Static

from engines.closing import closing
from engines.protocol import GenerationRequest, SamplingParams
from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.rebalance_lines import View
from flexpiped.flexctl.top_app import TopApp
from flexpiped.flexctl.top_command import AskedDaemon
from flexpiped.flexctl.top_lines import change_lines, follow, stage_map
from planner.arrivals import Absence, ArrivalStatistics
from tests.support.admin import AdminStand, admin_stand
from tests.support.until import until
from topology.device import cpu_devices
from topology.link import Link, LinkKind
from topology.topology import HostTopology

from .test_status_lines import PROGRESS


def stage(
    index: int, first: int, end: int, *, busy: float | None = None, weights_bytes: int = 1 << 20
) -> dict[str, Any]:
    return {
        "index": index,
        "device_ids": [f"cpu:{index}"],
        "first_decoder": first,
        "end_decoder": end,
        "weights_bytes": weights_bytes,
        "kv_mapped_bytes": 0,
        "busy": busy,
    }


def test_layers_are_drawn_at_their_place_in_the_model() -> None:
    status = {
        "stages": [stage(0, 0, 6, busy=0.5, weights_bytes=3 << 20), stage(1, 6, 8)],
        "reason": "",
        "under_way": None,
    }

    assert stage_map(status) == [
        " 0  cpu:0  [########################........]  busy #####.....  50 %  memory ########## 3 MiB",
        " 1  cpu:1  [........................########]  busy not reported      memory ###....... 1 MiB",
    ]
    assert change_lines(status, View()) == ["no change under way, 2 stages"]
    assert stage_map({"stages": [], "reason": "starting"}) == ["no stage: starting"]


def test_what_joins_a_stage_to_the_next_stands_behind_it() -> None:
    measured = Link(kind=LinkKind.SHARED_MEMORY, bandwidth_bytes_per_s=5.4e9, latency_s=2e-5, is_measured=True)
    host = HostTopology(
        host_id="", devices=cpu_devices(count=3, memory_bytes=1 << 30), links={("cpu:0", "cpu:1"): measured}
    )
    stages = [stage(0, 0, 2), stage(1, 2, 4), stage(2, 4, 6), stage(2, 6, 7), stage(9, 7, 8)]

    rows = stage_map({"stages": stages}, host)
    assert [row.partition("MiB")[2] for row in rows] == [
        *("  -> SHM 5.4 GB/s", "  -> SHM ~3.9 GB/s", "  -> same device"),
        *("", ""),  # to a device that is not there any more, and behind the last one
    ]
    assert max(map(len, rows)) <= 116


def test_a_change_is_drawn_as_far_as_it_is() -> None:
    status = {"stages": [], "under_way": "handover #3, 2 -> 4 stages, is in phase prepare (loading) since 0.1 s"}
    loading = PROGRESS | {"phase": "prepare", "weights_bytes": 1 << 20, "elapsed_s": 0.01}

    planned = follow(View(), {"state": "plan", "way": "in place"})
    assert change_lines(status, planned) == [f"now   {status['under_way']}"]

    view = follow(planned, {"state": "progress", "progress": loading})
    assert change_lines(status, view)[1] == "      prepare  ######..............  1 MiB of 3 MiB   0.0 ms"
    assert follow(view, {"device": "GPU0"}) == view
    assert follow(view, {"state": "ended"}) == View()


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[AdminStand]:
    async with admin_stand(tmp_path) as stand:
        yield stand


def text_of(app: TopApp, where: str) -> str:
    return str(app.query_one(where, Static).content)


def app_for(socket: Path, *, may_change: bool = False) -> TopApp:
    return TopApp(AskedDaemon(AdminClient([socket])), may_change=may_change, period_s=0.05)


@pytest.mark.real_loop
async def test_it_shows_the_daemon_and_follows_a_change(stand: AdminStand) -> None:
    app = app_for(stand.socket)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(lambda: text_of(app, "#now").startswith("demo   fake   epoch 0   2 stages"))
        assert text_of(app, "#stages").count("\n") == 1
        await asyncio.to_thread(AdminClient([stand.socket]).call, "POST", "/rebalance", {"stages": 4})
        await until(lambda: text_of(app, "#stages").count("\n") == 3)
        assert text_of(app, "#stages").count("  -> SHM ~3.9 GB/s") == 3
        await until(lambda: "done" in "".join(line.text for line in app.query_one("#events", RichLog).lines))
        await pilot.press("q")
    assert app.return_code == 0


WINDOWS = (
    ArrivalStatistics(window_s=30.0, arrivals=96, rate_per_s=3.2, cv=1.1, gradient_per_s2=0.0),
    ArrivalStatistics(window_s=180.0, arrivals=96, rate_per_s=0.53, cv=Absence.TOO_FEW, gradient_per_s2=0.0),
)


@asynccontextmanager
async def one_running_and_one_waiting(stand: AdminStand) -> AsyncIterator[None]:
    """Two requests at an engine with room for one, which is held after the first tokens."""
    await stand.status.sample()
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    first, second = (
        stand.engine.generate(GenerationRequest(request_id=name, prompt_token_ids=(1, 2, 3), sampling=sampling))
        for name in ("first", "second")
    )
    async with closing(first), closing(second):
        waiting = asyncio.ensure_future(anext(second))
        await anext(first)
        stand.engine.hold()
        await stand.status.sample()
        yield
        waiting.cancel()
        await asyncio.wait([waiting])


@pytest.mark.real_loop
async def test_during_a_change_its_phase_and_the_traffic_are_on_the_screen(tmp_path: Path) -> None:
    async with admin_stand(tmp_path, max_running=1, arrivals=WINDOWS) as stand, one_running_and_one_waiting(stand):
        stand.engine.hold_refactoring()
        app = app_for(stand.socket)
        async with app.run_test(size=(120, 40)):
            await asyncio.to_thread(AdminClient([stand.socket]).call, "POST", "/rebalance", {"stages": 4})
            await until(lambda: "2 -> 4 stages, is in phase prepare" in text_of(app, "#change"))
            assert "\n      prepare  no weights to load" in text_of(app, "#change")

            stand.engine.release_refactoring()  # the phase that is held goes on
            stand.engine.hold_refactoring()  # and the next one is
            await until(lambda: "is in phase sync (fake sync)" in text_of(app, "#change"))
            assert "\n      sync     nothing to copy" in text_of(app, "#change")
            assert text_of(app, "#stages").count("\n") == 1
            now = text_of(app, "#now")
            assert re.search(r"\n  1 running   1 waiting   [1-9]\d* tok/s   ", now), now
            assert "\n  load   3.20 requests/s   CV 1.10 (30 s)  too few requests to say (180 s)\n" in now

            stand.engine.release_refactoring()
            await until(lambda: text_of(app, "#change") == "no change under way, 4 stages")


@pytest.mark.real_loop
async def test_on_a_small_terminal_most_of_it_is_the_status(stand: AdminStand) -> None:
    app = app_for(stand.socket)
    async with app.run_test(size=(80, 24)) as pilot:
        await asyncio.to_thread(AdminClient([stand.socket]).call, "POST", "/rebalance", {"stages": 4})
        await until(lambda: text_of(app, "#stages").count("\n") == 3)
        await pilot.pause()
        assert app.query_one(VerticalScroll).size.height >= 17
        assert app.query_one("#events", RichLog).size.height >= 3


@pytest.mark.real_loop
async def test_keys_change_nothing_unless_that_is_asked_for(stand: AdminStand) -> None:
    app = app_for(stand.socket)
    async with app.run_test() as pilot:
        await until(lambda: "2 stages" in text_of(app, "#now"))
        await pilot.press("plus", "minus", "c")
        assert stand.engine.pipeline.granularity == 2
        assert text_of(app, "#said") == ""

    app = app_for(stand.socket, may_change=True)
    async with app.run_test() as pilot:
        await until(lambda: "2 stages" in text_of(app, "#now"))
        await pilot.press("plus")
        await until(lambda: stand.engine.pipeline.granularity == 3)
        await pilot.press("c")
        await until(lambda: text_of(app, "#said").startswith("refused: "))


@pytest.mark.real_loop
async def test_a_daemon_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    app = app_for(tmp_path / "admin.sock")
    async with app.run_test():
        await until(lambda: text_of(app, "#now").startswith("no daemon at "))


class TwoModels:
    """A daemon that serves two models and remembers what it was asked for."""

    def __init__(self, one: dict[str, Any]) -> None:
        every = [{**one, "model": {"name": name, "path": f"/srv/{name}"}, "stages": []} for name in ("a", "b")]
        self.answer = every[0] | {"models": every}
        self.asked: list[str] = []

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:  # noqa: ARG002
        self.asked.append(path)
        return self.answer if method == "GET" else {"message": "nothing is under way"}

    def events_since(self, sequence: int) -> list[dict[str, Any]]:  # noqa: ARG002
        return []


@pytest.mark.real_loop
async def test_of_two_models_one_is_shown_and_changed_and_both_are_named(stand: AdminStand) -> None:
    two = TwoModels(await asyncio.to_thread(AdminClient([stand.socket]).call, "GET", "/status"))
    app = TopApp(two, may_change=True, period_s=0.05, model="b")
    async with app.run_test(size=(120, 40)) as pilot:
        await until(lambda: "2 models: a, b" in text_of(app, "#now"))
        assert "/srv/b" in text_of(app, "#now")
        await pilot.press("c")
        await until(lambda: "/rebalance/cancel?model=b" in two.asked)
