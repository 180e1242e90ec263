"""The dashboard's routes over a real socket: what is open to whom, what the stream says, and what may be asked for."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flexpiped.dashboard.pages import SECURITY_HEADERS
from flexpiped.events import EventKind
from flexpiped.keys import Client, KeyRing, Scope
from flexpiped.settings import DashboardMode
from tests.support.dashboard import DashboardStand, dashboard_stand, messages_of
from tests.support.until import until

pytestmark = pytest.mark.real_loop
CHANGES = ("/dashboard/preview", "/dashboard/plan", "/dashboard/rebalance", "/dashboard/rebalance/cancel")


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[DashboardStand]:
    async with dashboard_stand(tmp_path) as stand:
        yield stand


@pytest.fixture
async def http(stand: DashboardStand) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(stand.url) as session:
        yield session


def ring(**scopes: Scope) -> KeyRing:
    return KeyRing(
        hashes=tuple(hashlib.sha256(f"key-of-{name}".encode()).digest() for name in scopes),
        clients=tuple(Client(name=name, scopes=frozenset({scope})) for name, scope in scopes.items()),
    )


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"} if name else {}


async def post(
    http: aiohttp.ClientSession, path: str, body: object, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    async with http.post(path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


async def first_messages(http: aiohttp.ClientSession, count: int, name: str = "") -> list[tuple[str, Any]]:
    async with http.get("/dashboard/stream", headers=bearer(name)) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        messages = messages_of(answer)
        return [await anext(messages) for _ in range(count)]


@pytest.mark.parametrize("path", ["/", "/dashboard/app/main.js", "/dashboard/app/theme.css", "/dashboard/app/icon.svg"])
async def test_files_have_the_headers_and_are_asked_for_again(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(path) as answer:
        assert answer.status == 200
        assert {name: answer.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert answer.headers["Cache-Control"] == "no-cache"
        etag = answer.headers["ETag"]
    async with http.get(path, headers={"If-None-Match": etag}) as answer:
        assert (answer.status, await answer.read()) == (304, b"")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "%2e%2e/routes.py", "__init__.py", ""])
async def test_nothing_else_is_served(http: aiohttp.ClientSession, name: str) -> None:
    async with http.get(f"/dashboard/app/{name}") as answer:
        assert answer.status in (404, 503)  # 503: no route of the application that is served while it starts


async def test_the_stream_begins_with_what_was_before(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    stand.events.publish(EventKind.DAEMON, "ready")
    stand.decisions.publish(EventKind.DECISION, "keep: nothing to gain", verb="keep", mode="on", numbers={})
    (rights, given), (hello, before) = await first_messages(http, 2)

    assert (rights, hello) == ("rights", "hello")
    assert given == {"may_preview": True, "why_no_change": "", "asks_for_keys": False}
    assert [(stage["device_ids"], stage["end_decoder"]) for stage in before["status"]["stages"]] == [
        (["cpu:0"], 4),
        (["cpu:1"], 8),
    ]
    assert [event["message"] for event in before["events"]] == ["ready"]
    assert [each["message"] for each in before["decisions"]] == ["keep: nothing to gain"]
    assert len(before["topology"]["devices"]) == 8
    assert before["cv_windows_s"] == [30.0, 180.0, 1800.0]


async def test_the_stream_goes_on_with_what_is_new(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    async with http.get("/dashboard/stream") as answer:
        messages = messages_of(answer)
        assert [(await anext(messages))[0] for _ in range(2)] == ["rights", "hello"]
        stand.decisions.publish(EventKind.DECISION, "change: CV 4", verb="change", mode="on", numbers={"cv": 4.0})
        seen = {topic: data async for topic, data in first_of(messages, {"status", "point", "decision"})}

    assert seen["decision"]["message"] == "change: CV 4"
    assert seen["status"]["engine_counters"]["kv_blocks_capacity"] == 4096
    assert seen["point"]["cvs"] == ["too few requests to say"] * 3


async def first_of(messages: AsyncIterator[tuple[str, Any]], topics: set[str]) -> AsyncIterator[tuple[str, Any]]:
    """Yield the first message of each topic."""
    left = set(topics)
    async for topic, data in messages:
        if topic in left:
            left.discard(topic)
            yield topic, data
        if not left:
            return


async def test_a_handover_is_told_from_its_plan_to_its_end(http: aiohttp.ClientSession) -> None:
    async with http.get("/dashboard/stream") as answer:
        messages = messages_of(answer)
        for _ in range(2):
            await anext(messages)
        status, started = await post(http, "/dashboard/rebalance", {"stages": 4})
        assert (status, started["state"], started["handover"]) == (202, "started", 1)
        states = []
        async for topic, data in messages:
            if topic == "event" and data["fields"].get("handover") == 1:
                states.append(data["fields"]["state"])
            if topic == "status" and data["last_handover"] is not None and len(data["stages"]) == 4:
                break
    assert (states[0], states[-1]) == ("plan", "ended")
    assert "progress" in states

    (_rights, _), (_hello, late) = await first_messages(http, 2)
    told = [event["fields"]["state"] for event in late["events"]]
    assert told == ["plan", "progress", "ended"]  # who comes late gets of the progress the last report


async def test_a_preview_moves_nothing(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    status, answer = await post(http, "/dashboard/preview", {"stages": 4, "dry_run": False})

    assert (status, answer["state"], answer["proposal"]["what"]) == (200, "dry_run", "2 -> 4 stages")
    assert len(answer["proposal"]["target"]) == 4
    assert (stand.engine.epoch, stand.refactorings.under_way) == (0, None)
    assert await post(http, "/dashboard/plan", {"stages": 4}) == (200, stand.plans.ANSWER)
    assert stand.plans.asked == [4]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/dashboard/rebalance", {"stages": 99}, 409, "infeasible"),
        ("/dashboard/rebalance", {"layout": "{"}, 409, "invalid_layout"),
        ("/dashboard/rebalance", {"stagse": 2}, 400, "bad_request"),
        ("/dashboard/rebalance/cancel", {}, 409, "nothing_to_cancel"),
        ("/dashboard/preview", [], 400, "bad_request"),
    ],
)
async def test_refusals_are_those_of_the_admin_api(
    http: aiohttp.ClientSession, path: str, body: object, status: int, code: str
) -> None:
    found, answer = await post(http, path, body)

    assert (found, answer["error"]["code"]) == (status, code)


@pytest.mark.parametrize("path", CHANGES)
async def test_another_origin_may_not_ask(stand: DashboardStand, http: aiohttp.ClientSession, path: str) -> None:
    status, answer = await post(http, path, {"stages": 4}, {"Origin": "https://evil.example.org"})
    assert (status, answer["error"]["code"]) == (403, "refused")
    async with http.post(path, data=b'{"stages": 4}', headers={"Content-Type": "text/plain"}) as simple:
        assert simple.status == 403
    assert stand.engine.epoch == 0


async def test_scopes(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    stand.ring = ring(alice=Scope.INFER, grafana=Scope.READ, root=Scope.ADMIN)
    people = ("", "alice", "grafana", "root")

    async def statuses(method: str, path: str) -> list[int]:
        found = []
        for name in people:
            body = None if method == "GET" else {"stages": 2}
            async with http.request(method, path, json=body, headers=bearer(name)) as answer:
                found.append(answer.status)
        return found

    assert await statuses("GET", "/") == [200] * 4
    assert await statuses("GET", "/dashboard/app/main.js") == [200] * 4
    assert await statuses("GET", "/dashboard/stream") == [401, 403, 200, 200]
    for path in ("/dashboard/preview", "/dashboard/plan", "/dashboard/rebalance"):
        assert await statuses("POST", path) == [401, 403, 403, 200]
    assert await statuses("POST", "/dashboard/rebalance/cancel") == [401, 403, 403, 409]
    [(_, reader)] = await first_messages(http, 1, "grafana")
    [(_, admin)] = await first_messages(http, 1, "root")
    assert (reader["may_preview"], bool(reader["why_no_change"])) == (False, True)
    assert (admin["may_preview"], admin["why_no_change"]) == (True, "")


async def test_a_key_that_is_taken_away_ends_its_stream(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    stand.ring = ring(grafana=Scope.READ)
    async with http.get("/dashboard/stream", headers=bearer("grafana")) as answer:
        await anext(messages_of(answer))
        stand.ring = ring(root=Scope.ADMIN)
        async with asyncio.timeout(30.0):
            await answer.read()
    async with http.get("/dashboard/stream", headers=bearer("grafana")) as answer:
        assert answer.status == 401


async def test_without_keys_it_shows_and_previews_but_changes_nothing(
    stand: DashboardStand, http: aiohttp.ClientSession
) -> None:
    stand.mode = DashboardMode.ON
    [(_, rights)] = await first_messages(http, 1)
    assert rights["may_preview"]
    assert 'http.dashboard = "control"' in rights["why_no_change"]
    assert (await post(http, "/dashboard/preview", {"stages": 4}))[0] == 200
    status, answer = await post(http, "/dashboard/rebalance", {"stages": 4})
    assert (status, answer["error"]["message"]) == (403, rights["why_no_change"])
    assert (await post(http, "/dashboard/rebalance/cancel", {}))[0] == 403
    assert stand.engine.epoch == 0


async def test_one_that_is_off_is_not_there(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    async with http.get("/dashboard/stream") as answer:
        await anext(messages_of(answer))
        stand.mode = DashboardMode.OFF  # a reload ends what is open
        async with asyncio.timeout(30.0):
            await answer.read()
    for path in ("/", "/dashboard/app/main.js", "/dashboard/stream"):
        async with http.get(path) as answer:
            assert answer.status == 404
    for path in CHANGES:
        async with http.post(path, json={"stages": 4}) as answer:
            assert answer.status == 404


async def test_the_end_of_the_feed_ends_every_stream(stand: DashboardStand, http: aiohttp.ClientSession) -> None:
    async with http.get("/dashboard/stream") as answer:
        messages = messages_of(answer)
        await anext(messages)
        stand.events.publish(EventKind.DAEMON, "draining: streams in flight are finishing")
        stand.feed.close("the daemon ends")
        said = [(topic, data) async for topic, data in messages]
    assert said[-1] == ("bye", {"reason": "the daemon ends"})
    assert any(topic == "event" and "draining" in data["message"] for topic, data in said)
    async with http.get("/dashboard/stream") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "no_stream")


async def test_so_many_may_look_on_and_who_leaves_makes_room(
    stand: DashboardStand, http: aiohttp.ClientSession
) -> None:
    async with (
        aiohttp.ClientSession(stand.url, connector=aiohttp.TCPConnector(limit=100)) as session,
        AsyncExitStack() as streams,
    ):
        for _ in range(64):
            await streams.enter_async_context(session.get("/dashboard/stream"))
        async with http.get("/dashboard/stream") as answer:
            assert answer.status == 503

    async def has_room() -> bool:
        async with http.get("/dashboard/stream") as answer:
            return answer.status == 200

    await until(has_room)


async def test_no_prompt_is_in_the_stream(http: aiohttp.ClientSession) -> None:
    """The stream is made of status, load, events, decisions and topology; none of these has a request's content."""
    topics = dict(await first_messages(http, 6))

    assert set(topics) <= {"rights", "hello", "status", "point", "event", "decision", "topology"}
    assert set(topics["hello"]) == {
        *("now_unix_s", "period_s", "cv_windows_s", "status", "topology", "points", "events", "decisions")
    }
    assert not {"prompt", "messages", "text", "content"} & keys_in(json.loads(json.dumps(topics)))


def keys_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys_in(each) for each in value.values()))
    return set().union(*(keys_in(each) for each in value)) if isinstance(value, list) else set()
