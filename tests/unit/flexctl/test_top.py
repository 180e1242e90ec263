"""``flexctl top`` with its pilot, against a real admin socket with the fake engine behind it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from textual.containers import VerticalScroll
from textual.widgets import RichLog, Static

from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.top_app import TopApp
from flexpiped.flexctl.top_command import AskedDaemon
from flexpiped.flexctl.top_lines import change_line, stage_map
from tests.support.admin import AdminStand, admin_stand
from tests.support.until import until


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
        " 0  cpu:0  [##############################..........]  busy #####.....  50 %  memory ########## 3 MiB",
        " 1  cpu:1  [..............................##########]  busy not reported      memory ###....... 1 MiB",
    ]
    assert change_line(status) == "no change under way, 2 stages"
    assert stage_map({"stages": [], "reason": "starting"}) == ["no stage: starting"]


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
        await until(lambda: "done" in "".join(line.text for line in app.query_one("#events", RichLog).lines))
        await pilot.press("q")
    assert app.return_code == 0


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
