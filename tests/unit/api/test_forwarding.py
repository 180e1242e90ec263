"""Requests for the engine's own server: unchanged there and back, counted, and ended with either side."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from engines.restarts import RestartPolicy
from flexpiped.admission import AdmissionLimits
from flexpiped.api.forwarding import GENERATING_PATHS, OWN_PATHS, tokens_expected
from tests.support.fake_own_server import (
    DONE,
    EVENTS,
    USAGE,
    WHOLE,
    Answer,
    EngineWithServer,
    FakeOwnServer,
    cut,
    fake_own_server,
    for_ever,
    refusal,
    streaming,
    whole,
)
from tests.support.http_app import CAPABILITIES, MODEL, FakeEngines, HttpApp, http_app, saying
from tests.support.until import until

pytestmark = pytest.mark.real_loop
RAW = b'{"prompt":  "Once", "n": 2, "max_tokens": 6}'
STREAM = b'{"prompt": "Once", "n": 2, "stream": true}'


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeOwnServer]:
    async with fake_own_server(tmp_path) as server:
        yield server


@pytest.fixture
async def app(server: FakeOwnServer) -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=saying("ours"), own_socket=server.socket)) as app:
        yield app
        await app.becomes_idle()


def samples(app: HttpApp) -> list[str]:
    return app.backend.metrics.render(None).decode().splitlines()


async def test_there_and_back_unchanged(app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    headers = {"Authorization": "Bearer x", "Content-Type": "text/plain"}
    async with session.post(f"{app.url}/v1/completions?a=b%20c", data=RAW, headers=headers) as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert response.headers["X-Kept"] == "yes"
        assert "uvicorn" not in response.headers["Server"]
        assert await response.read() == WHOLE
    (asked,) = server.asked
    assert (asked.path, asked.body) == ("/v1/completions?a=b%20c", RAW)
    assert asked.headers["Authorization"] == "Bearer x"
    assert asked.headers.getall("Content-Type") == ["application/json"]
    assert "Accept-Encoding" not in asked.headers
    assert {
        'flexpiped_requests_total{endpoint="completions",outcome="done"} 1.0',
        "flexpiped_request_prompt_tokens_total 3.0",
        "flexpiped_request_completion_tokens_total 6.0",
        "flexpiped_time_to_first_token_seconds_count 0.0",
        "flexpiped_requests_in_flight 0.0",
    } <= set(samples(app))


async def test_a_server_that_asks_for_the_daemons_key_gets_it_instead_of_the_clients(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    engine = app.engines.last
    assert isinstance(engine, EngineWithServer)
    engine.own_routes_key = "ours"
    headers = {"Authorization": "Bearer x"}
    async with session.post(f"{app.url}/v1/completions", data=RAW, headers=headers) as response:
        assert response.status == 200
    (asked,) = server.asked
    assert asked.headers.getall("Authorization") == ["Bearer ours"]


async def test_a_stream_comes_byte_for_byte(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    sent = b"".join([*EVENTS, USAGE, DONE])
    server.answer = streaming(sent[:10], sent[10:60], sent[60:])
    async with session.post(f"{app.url}/v1/chat/completions", json={"messages": [], "n": 2}) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert await response.read() == sent
    assert {
        'flexpiped_requests_total{endpoint="chat",outcome="done"} 1.0',
        "flexpiped_request_completion_tokens_total 6.0",
        "flexpiped_time_to_first_token_seconds_count 1.0",
        "flexpiped_time_per_output_token_seconds_count 0.0",
    } <= set(samples(app))


async def test_events_come_as_they_are_made(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = streaming(EVENTS[0], EVENTS[1][:9], then=for_ever)
    async with session.post(f"{app.url}/v1/completions", data=STREAM) as response:
        assert await response.content.readuntil(b"\n\n") == EVENTS[0]
    await until(lambda: server.open == 0)  # the client has left, so the server knows it, too


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
async def test_a_client_that_leaves_before_the_answer(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession, streams: bool
) -> None:
    server.answer = streaming(then=for_ever) if streams else never
    asking = asyncio.create_task(session.post(f"{app.url}/v1/completions", data=STREAM if streams else RAW))
    await until(lambda: server.open == 1)
    assert app.backend.admission.requests_in_flight == 1
    asking.cancel()
    await until(lambda: server.open == 0)
    await app.becomes_idle()
    assert 'flexpiped_requests_total{endpoint="completions",outcome="disconnected"} 1.0' in samples(app)


async def test_its_refusals_are_passed_on(app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    server.answer = refusal(400, b'{"error": {"message": "no", "code": 400}}')
    async with session.post(f"{app.url}/v1/completions", data=RAW) as response:
        assert (response.status, await response.read()) == (400, b'{"error": {"message": "no", "code": 400}}')
    assert 'flexpiped_requests_total{endpoint="completions",outcome="refused"} 1.0' in samples(app)


async def test_ours_stay_ours(app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    body = {"prompt": "Once", "min_p": 0.1, "n": 1, "model": MODEL}
    async with session.post(f"{app.url}/v1/completions", json=body) as response:
        assert (await response.json())["choices"][0]["text"] == "ours"
    async with session.post(f"{app.url}/v1/completions", json=body | {"mox_tokens": 1}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, "mox_tokens")
    assert server.asked == []


@pytest.mark.parametrize("path", OWN_PATHS)
async def test_routes_that_only_the_engine_has(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession, path: str
) -> None:
    async with session.post(f"{app.url}{path}", json={"input": "x"}) as response:
        assert await response.read() == WHOLE
    assert (server.asked[0].path, json.loads(server.asked[0].body)) == (path, {"input": "x"})
    assert 'flexpiped_requests_total{endpoint="engine",outcome="done"} 1.0' in samples(app)
    async with session.post(f"{app.url}{path}", data=b"{") as response:
        assert response.status == 400


async def test_an_engine_without_a_server(session: aiohttp.ClientSession) -> None:
    async with http_app() as app, session.post(f"{app.url}/pooling", json={"input": "x"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "no_such_route")
        assert error["message"] == "POST /pooling: the fake engine has no server of its own that could answer this"


async def test_a_model_that_only_embeds(server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(capabilities=replace(CAPABILITIES, generates=False), own_socket=server.socket)
    async with http_app(engines=engines) as app:
        for path in ("/v1/completions", "/v1/chat/completions", *GENERATING_PATHS):
            async with session.post(f"{app.url}{path}", json={"prompt": "x", "n": 2}) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (404, "model_does_not_generate")
                assert f"{MODEL} generates nothing: the vllm engine has it to embed" in error["message"]
        assert server.asked == []
        async with session.post(f"{app.url}/v1/embeddings", json={"input": "x"}) as response:
            assert await response.read() == WHOLE
        async with session.get(f"{app.url}/readyz") as response:
            assert response.status == 200


async def test_a_server_that_has_no_such_route_for_the_model(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = refusal(404, b'{"detail":"Not Found"}')
    async with session.post(f"{app.url}/v1/embeddings", json={"input": "x"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "no_such_route")
        said = f"POST /v1/embeddings: {MODEL} generates, and the vllm engine's own server has no such route for it"
        assert error["message"] == said
    assert 'flexpiped_requests_total{endpoint="engine",outcome="refused"} 1.0' in samples(app)
    server.answer = refusal(404, b'{"error": {"message": "no such model"}}')
    async with session.post(f"{app.url}/v1/embeddings", json={"input": "x"}) as response:
        assert await response.read() == b'{"error": {"message": "no such model"}}'


async def test_an_engine_that_is_changed_for_one_without_a_server(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    async def change(http: web.Request) -> web.StreamResponse:
        app.engines.own_socket = None  # what is made from now on has none
        app.engines.last.kill("killed by the test")
        await cut(http)
        await for_ever(http)
        raise AssertionError

    server.answer = change
    async with session.post(f"{app.url}/v1/responses", json={"input": "x"}) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (404, "no_such_route")
    assert len(app.engines.made) == 2


class Dying:
    """Ends the connection, and the engine with it, the first ``times`` times; answers after that."""

    def __init__(self, engines: FakeEngines, *, times: int, status: int | None = None) -> None:
        self._engines = engines
        self._left = times
        self._status = status

    async def __call__(self, http: web.Request) -> web.StreamResponse:
        if not self._left:
            return await whole(http)
        self._left -= 1
        self._engines.last.kill("killed by the test")
        if self._status is not None:
            return web.Response(status=self._status, text="EngineCore encountered an issue")
        await cut(http)
        await for_ever(http)
        raise AssertionError


@pytest.mark.parametrize("status", [None, 500, 503])
async def test_a_request_without_an_answer_is_asked_again(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession, status: int | None
) -> None:
    server.answer = Dying(app.engines, times=1, status=status)
    async with session.post(f"{app.url}/v1/completions", data=RAW) as response:
        assert (response.status, await response.read()) == (200, WHOLE)
    assert (len(server.asked), len(app.engines.made)) == (2, 2)


async def test_a_request_that_kills_every_engine(server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(own_socket=server.socket)
    server.answer = Dying(engines, times=9)
    async with http_app(engines=engines, policy=RestartPolicy(first_delay_s=0.0, max_deaths=9)) as app:
        async with session.post(f"{app.url}/v1/completions", data=RAW) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "engine_unavailable")
            assert "times in a row over this request" in error["message"]
        await app.becomes_idle()


async def test_a_stream_that_has_begun_ends_with_an_error(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    async def die(http: web.Request) -> None:
        app.engines.last.kill("killed by the test")
        await cut(http)

    server.answer = streaming(EVENTS[0], EVENTS[1][:9], then=die)
    async with session.post(f"{app.url}/v1/completions", data=STREAM) as response:
        first, last, rest = (await response.read()).split(b"\n\n")
    assert (first + b"\n\n", rest) == (EVENTS[0], b"")
    error: dict[str, Any] = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "engine_unavailable")
    assert "the engine died during the answer" in error["message"]
    assert 'flexpiped_requests_total{endpoint="completions",outcome="failed"} 1.0' in samples(app)
    await until(lambda: bool(app.backend.serving.engines))


async def test_a_server_that_hangs_up_while_its_engine_lives(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = streaming(then=cut)
    async with session.post(f"{app.url}/v1/completions", data=STREAM) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"]) == (500, "engine_error")
        assert "ended the connection" in error["message"]


async def test_a_server_error_of_an_engine_that_lives_is_passed_on(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = refusal(500, b"{}")
    async with session.post(f"{app.url}/v1/completions", data=RAW) as response:
        assert (response.status, await response.read()) == (500, b"{}")
    assert 'flexpiped_requests_total{endpoint="completions",outcome="failed"} 1.0' in samples(app)


async def test_admission_counts_them(server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(own_socket=server.socket)
    server.answer = streaming(EVENTS[0], then=for_ever)
    async with http_app(engines=engines, limits=AdmissionLimits(max_requests_in_flight=1)) as app:
        async with session.post(f"{app.url}/v1/completions", data=STREAM) as first:
            assert first.status == 200
            assert app.backend.admission.tokens_in_flight == len(STREAM) // 4 + 2 * 16
            async with session.post(f"{app.url}/v1/completions", data=RAW) as second:
                assert (second.status, second.headers["Retry-After"]) == (429, "1")
        await app.becomes_idle()


IN_TIME = {"X-Request-Deadline-Ms": "300"}


async def never(http: web.Request) -> web.StreamResponse:
    await for_ever(http)
    raise AssertionError


@pytest.mark.parametrize("answer", [never, streaming(then=for_ever)], ids=["no head", "no event"])
async def test_a_deadline_before_the_answer(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession, answer: Answer
) -> None:
    server.answer = answer
    async with session.post(f"{app.url}/v1/completions", data=STREAM, headers=IN_TIME) as response:
        error = (await response.json())["error"]
        assert (response.status, error["code"], response.headers["Retry-After"]) == (503, "deadline_exceeded", "1")
    await until(lambda: server.open == 0)
    await app.becomes_idle()
    assert 'flexpiped_requests_total{endpoint="completions",outcome="late"} 1.0' in samples(app)


async def test_a_deadline_in_mid_stream_is_an_event(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = streaming(EVENTS[0], EVENTS[1][:9], then=for_ever)
    async with session.post(f"{app.url}/v1/completions", data=STREAM, headers=IN_TIME) as response:
        first, last, rest = (await response.read()).split(b"\n\n")
    assert (response.status, first + b"\n\n", rest) == (200, EVENTS[0], b"")
    error: dict[str, Any] = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "deadline_exceeded")
    await until(lambda: server.open == 0)
    await app.becomes_idle()
    assert 'flexpiped_requests_total{endpoint="completions",outcome="late"} 1.0' in samples(app)


async def test_a_deadline_while_the_engine_recovers(server: FakeOwnServer, session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(own_socket=server.socket)
    async with http_app(engines=engines, policy=RestartPolicy(first_delay_s=60.0)) as app:
        engines.last.kill("killed by the test")
        await until(lambda: not app.backend.serving.engines)
        async with session.post(f"{app.url}/v1/completions", data=RAW, headers=IN_TIME) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "deadline_exceeded")
        assert (app.backend.admission.requests_in_flight, server.asked) == (0, [])


async def test_an_answer_in_time_is_left_alone(
    app: HttpApp, server: FakeOwnServer, session: aiohttp.ClientSession
) -> None:
    server.answer = streaming(*EVENTS, DONE)
    headers = {"X-Request-Deadline-Ms": "60000"}
    async with session.post(f"{app.url}/v1/completions", data=STREAM, headers=headers) as response:
        assert await response.read() == b"".join([*EVENTS, DONE])
    assert 'flexpiped_requests_total{endpoint="completions",outcome="done"} 1.0' in samples(app)


@pytest.mark.parametrize(
    ("body", "default", "tokens"),
    [
        ({}, 16, 10 + 16),
        ({}, None, 10 + 100),
        ({}, 0, 10),
        ({"max_tokens": 7, "n": 3}, 16, 10 + 21),
        ({"max_completion_tokens": 7, "max_tokens": 8}, None, 10 + 7),
        ({"max_output_tokens": 7}, None, 10 + 7),
        ({"max_tokens": 10**9}, None, 10 + 100),
        ({"max_tokens": True, "n": "x"}, 16, 10 + 16),
        ({"max_tokens": -1, "n": 0}, 16, 10 + 16),
    ],
)
def test_tokens_are_estimated(body: dict[str, Any], default: int | None, tokens: int) -> None:
    assert tokens_expected(body, num_bytes=43, default=default, max_model_len=100) == tokens
    assert tokens_expected({}, num_bytes=10**9, default=0, max_model_len=100) == 100
