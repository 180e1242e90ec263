"""The admin API over a real Unix socket."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.admin import AdminStand, admin_stand
from tests.support.until import until

pytestmark = pytest.mark.real_loop


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[AdminStand]:
    async with admin_stand(tmp_path) as stand:
        yield stand


@pytest.fixture
async def http(stand: AdminStand) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.UnixConnector(str(stand.socket))
    async with aiohttp.ClientSession("http://flexpiped", connector=connector) as session:
        yield session


async def post(http: aiohttp.ClientSession, path: str, body: object) -> tuple[int, dict[str, Any]]:
    async with http.post(path, json=body) as response:
        return response.status, await response.json()


def error_of(answer: tuple[int, dict[str, Any]]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


async def test_status(http: aiohttp.ClientSession) -> None:
    async with http.get("/status") as response:
        status = await response.json()

    assert (status["state"], status["model"]) == ("ready", {"name": "demo", "path": "/srv/demo"})
    assert [(stage["device_ids"], stage["end_decoder"]) for stage in status["stages"]] == [
        (["cpu:0"], 4),
        (["cpu:1"], 8),
    ]
    assert status["engine_counters"]["kv_blocks_capacity"] == 4096
    assert (status["ttft"], status["tpot"]) == ({"p50_s": 0.02, "p99_s": 0.05}, None)
    assert (status["epoch"], status["last_handover"], status["under_way"]) == (0, None, None)


async def test_status_of_a_dead_engine_has_no_stages(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    stand.engine.kill("killed by a test")
    async with http.get("/status") as response:
        status = await response.json()

    assert (status["stages"], status["engine_counters"], status["epoch"]) == ([], None, None)


async def test_rebalance_is_started_and_shows_in_the_status(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    code, answer = await post(http, "/rebalance", {"stages": 4})

    assert (code, answer["state"], answer["handover"]) == (202, "started", 1)
    await until(lambda: stand.refactorings.under_way is None)
    async with http.get("/status") as response:
        status = await response.json()
    assert (len(status["stages"]), status["epoch"]) == (4, 1)
    assert (status["last_handover"]["result"], status["last_handover"]["stages_after"]) == ("done", 4)


async def test_waiting_streams_the_progress(http: aiohttp.ClientSession) -> None:
    async with http.post("/rebalance", json={"layout": "4", "wait": True}) as response:
        events = [json.loads(line) async for line in response.content]

    assert response.content_type == "application/x-ndjson"
    assert [event["fields"]["state"] for event in events] == ["plan", *["progress"] * 5, "ended"]


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ({"engine": "vllm"}, 409, "unsupported"),
        ({"engine": "vllm", "stages": 2, "layout": "2"}, 400, "bad_request"),
        ({"engine": "fake"}, 400, "bad_request"),
    ],
)
async def test_another_engine(http: aiohttp.ClientSession, body: dict[str, object], code: int, error: str) -> None:
    assert error_of(await post(http, "/rebalance", body)) == (code, error)


async def test_a_dry_run_answers_with_the_plan(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    code, answer = await post(http, "/rebalance", {"stages": 4, "dry_run": True})

    assert (code, answer["state"], answer["proposal"]["feasible"]) == (200, "dry_run", True)
    assert len(answer["proposal"]["target"]) == 4
    assert stand.refactorings.under_way is None


async def test_the_layout_in_force_is_unchanged(http: aiohttp.ClientSession) -> None:
    code, answer = await post(http, "/rebalance", {"stages": 2, "wait": True})

    assert (code, answer["state"]) == (200, "unchanged")


async def test_busy_and_cancel(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    stand.engine.hold_refactoring()
    await post(http, "/rebalance", {"stages": 4})
    await until(lambda: "prepare" in (stand.refactorings.under_way or ""))

    assert error_of(await post(http, "/rebalance", {"stages": 1})) == (409, "busy")
    code, answer = await post(http, "/rebalance/cancel", {})
    assert (code, answer["state"]) == (200, "cancelled")
    await until(lambda: stand.refactorings.under_way is None)
    assert error_of(await post(http, "/rebalance/cancel", {})) == (409, "nothing_to_cancel")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"stages": 9}, 409, "infeasible"),
        ({"layout": "words"}, 409, "invalid_layout"),
        ({"stages": 2, "layout": "2"}, 400, "bad_request"),
        ({"stages": "two"}, 400, "bad_request"),
        ({"stages": 2, "wiat": True}, 400, "bad_request"),
    ],
)
async def test_refusals(http: aiohttp.ClientSession, body: dict[str, Any], status: int, code: str) -> None:
    assert error_of(await post(http, "/rebalance", body)) == (status, code)


async def test_a_dead_engine_is_unavailable(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    stand.engine.kill("killed by a test")

    code, answer = await post(http, "/rebalance", {"stages": 4})
    assert (code, answer["error"]) == (503, {"code": "engine_unavailable", "message": "killed by a test"})


async def test_unknown_paths_are_errors_too(http: aiohttp.ClientSession) -> None:
    async with http.get("/nothing") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "bad_request")


async def test_events_of_the_past_and_of_the_future(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    await post(http, "/rebalance", {"stages": 4})
    await until(lambda: stand.refactorings.under_way is None)
    async with http.get("/events", params={"since": 1}) as response:
        past = [json.loads(line) async for line in response.content]
    assert [event["sequence"] for event in past] == [2, 3, 4, 5, 6, 7]

    async with http.get("/events", params={"since": 6, "follow": 1}) as response:
        assert json.loads(await response.content.readline())["sequence"] == 7
        await post(http, "/rebalance", {"stages": 1})
        assert json.loads(await response.content.readline())["message"] == "plan: 4 -> 1 stages"


async def test_since_must_be_a_number(http: aiohttp.ClientSession) -> None:
    for since in ("yesterday", "-5"):
        async with http.get("/events", params={"since": since}) as response:
            assert response.status == 400


async def test_a_follower_that_leaves_ends_only_its_own_stream(http: aiohttp.ClientSession, stand: AdminStand) -> None:
    stand.engine.hold_refactoring()
    async with http.post("/rebalance", json={"stages": 4, "wait": True}) as response:
        await response.content.readline()
    stand.engine.release_refactoring()

    await until(lambda: stand.refactorings.under_way is None)
    assert stand.refactorings.history[-1].result.value == "done"
