"""API keys and deadlines over a real socket: who is let in, for how long, and what the others are told."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from flexpiped.admission import AdmissionLimits
from flexpiped.keys import Client, KeyRing, Scope
from tests.support.http_app import FakeEngines, HttpApp, http_app, saying
from tests.support.until import until

pytestmark = pytest.mark.real_loop
COMPLETION = {"prompt": "Once", "max_tokens": 4, "ignore_eos": True}


def ring(**scopes: Scope) -> KeyRing:
    return KeyRing(
        hashes=tuple(hashlib.sha256(f"key-of-{name}".encode()).digest() for name in scopes),
        clients=tuple(Client(name=name, scopes=frozenset({scope})) for name, scope in scopes.items()),
    )


class Keys:
    """The keys in force, which a test may change."""

    def __init__(self) -> None:
        self.ring: KeyRing | None = ring(alice=Scope.INFER, grafana=Scope.READ, root=Scope.ADMIN)

    def __call__(self) -> KeyRing | None:
        return self.ring


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
async def app(keys: Keys) -> AsyncIterator[HttpApp]:
    async with http_app(keys=keys) as app:
        yield app
        await app.becomes_idle()


@pytest.fixture
async def session(app: HttpApp) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(app.url) as session:
        yield session


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key-of-{name}"}


async def status_of(session: aiohttp.ClientSession, path: str, headers: dict[str, str]) -> int:
    method, body = ("POST", COMPLETION) if "completions" in path else ("GET", None)
    async with session.request(method, path, json=body, headers=headers) as answer:
        return answer.status


@pytest.mark.parametrize(
    ("path", "nobody", "alice", "grafana", "root"),
    [
        ("/v1/completions", 401, 200, 403, 200),
        ("/v1/models", 401, 200, 200, 200),
        ("/metrics", 401, 403, 200, 200),
        ("/healthz", 200, 200, 200, 200),
        ("/readyz", 200, 200, 200, 200),
        ("/nothing/here", 401, 404, 403, 404),
    ],
)
async def test_scopes(
    session: aiohttp.ClientSession, path: str, nobody: int, alice: int, grafana: int, root: int
) -> None:
    asked = {"": {}, "alice": bearer("alice"), "grafana": bearer("grafana"), "root": bearer("root")}
    found = [await status_of(session, path, headers) for headers in asked.values()]

    assert found == [nobody, alice, grafana, root]


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Basic YTpi"}, "missing_api_key"),
        ({"Authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
    ],
)
async def test_who_has_no_key_is_told_how(session: aiohttp.ClientSession, header: dict[str, str], code: str) -> None:
    async with session.get("/v1/models", headers=header) as answer:
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert (await answer.json())["error"]["code"] == code


async def test_keys_change_while_it_serves(session: aiohttp.ClientSession, keys: Keys) -> None:
    keys.ring = ring(bob=Scope.INFER)
    assert await status_of(session, "/v1/models", bearer("alice")) == 401
    assert await status_of(session, "/v1/models", bearer("bob")) == 200
    keys.ring = None
    assert await status_of(session, "/v1/models", {}) == 200


async def error_of(answer: aiohttp.ClientResponse) -> tuple[int, str, bool]:
    code: Any = (await answer.json())["error"]["code"]
    return answer.status, str(code), "Retry-After" in answer.headers


async def test_a_deadline_ends_a_request_that_runs() -> None:
    async with http_app() as app, aiohttp.ClientSession(app.url) as session:
        app.engines.last.hold()
        async with session.post("/v1/completions", json=COMPLETION, headers={"X-Request-Deadline-Ms": "50"}) as answer:
            assert await error_of(answer) == (503, "deadline_exceeded", True)
        await app.becomes_idle()


async def test_a_deadline_in_mid_stream_is_an_event() -> None:
    engines = FakeEngines(next_token=saying("", then=[40]), step_s=0.05)
    async with http_app(engines=engines) as app, aiohttp.ClientSession(app.url) as session:
        body = COMPLETION | {"max_tokens": 200, "stream": True}
        async with session.post("/v1/completions", json=body, headers={"X-Request-Deadline-Ms": "1000"}) as answer:
            text = await answer.text()
            assert answer.status == 200
            assert '"code":"deadline_exceeded"' in text.split("\n\n")[-2]
        await app.becomes_idle()


async def test_a_deadline_in_the_line_frees_the_place_in_it() -> None:
    limits = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=1)
    async with http_app(limits=limits) as app, aiohttp.ClientSession(app.url) as session:
        app.engines.last.hold()
        first = asyncio.create_task(session.post("/v1/completions", json=COMPLETION))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        headers = {"X-Request-Deadline-Ms": "50"}
        async with session.post("/v1/completions", json=COMPLETION, headers=headers) as answer:
            assert await error_of(answer) == (503, "deadline_exceeded", True)
        assert app.backend.admission.requests_queued == 0
        waiting = asyncio.create_task(session.post("/v1/completions", json=COMPLETION))
        await until(lambda: app.backend.admission.requests_queued == 1)
        async with session.post("/v1/completions", json=COMPLETION) as answer:
            assert await error_of(answer) == (429, "too_many_requests_in_flight", True)
        app.engines.last.release()
        for each in (first, waiting):
            assert (await each).status == 200


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1.5", "99999999999", "²"])
async def test_a_deadline_that_is_none_is_refused(value: str) -> None:
    async with http_app() as app, aiohttp.ClientSession(app.url) as session:
        headers = {"X-Request-Deadline-Ms": value}
        async with session.post("/v1/completions", json=COMPLETION, headers=headers) as answer:
            assert (await error_of(answer))[:2] == (400, "invalid_value")


async def test_a_body_that_does_not_arrive_ends_the_request() -> None:
    async with http_app(body_deadline_s=0.05) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(app.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_header_that_is_too_large_is_refused() -> None:
    async with (
        http_app() as app,
        aiohttp.ClientSession(app.url) as session,
        session.get("/v1/models", headers={"X-Large": "a" * 20_000}) as answer,
    ):
        assert answer.status == 431
