"""What SGLang answers, put into a request's stream: what ends it, and whose fault a failure is."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from engines.errors import EngineStartFailed
from engines.protocol import FinishReason
from engines.served.streams import Stream
from engines.sglang.adapter import ensure_room, put
from engines.sglang.http import Event, Refused, RequestFailed, SglangHttp
from engines.sglang.options import SglangOptions
from tests.support.fake_own_server import FakeOwnServer, fake_own_server, refusal, streaming

pytestmark = pytest.mark.real_loop


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[FakeOwnServer]:
    async with fake_own_server(tmp_path) as server:
        yield server


@pytest.fixture
async def sglang(server: FakeOwnServer) -> AsyncIterator[SglangHttp]:
    sglang = SglangHttp(server.socket, key="k", admin_key="a")
    yield sglang
    await sglang.close()


def event(*token_ids: int, finish: str = "") -> Event:
    return Event(token_ids=token_ids, logprobs=(), finish=finish, status=0, reason="")


def sent(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


async def test_nothing_comes_after_a_stop_token_however_events_arrive() -> None:
    stream = Stream()
    for came in (event(5), event(9), event(7), event(8, finish="length")):
        put(stream, came, frozenset({9}))
    (chunk,) = [chunk async for chunk in stream]
    assert (chunk.token_ids, chunk.finish_reason) == ((5, 9), FinishReason.STOP)


async def test_an_end_of_an_unknown_kind_is_an_end(sglang: SglangHttp, server: FakeOwnServer) -> None:
    server.answer = streaming(sent({"output_ids": [5], "meta_info": {"finish_reason": {"why": "?"}}}))
    stream = Stream()
    async for came in sglang.generate({}):
        put(stream, came, frozenset())
    (chunk,) = [chunk async for chunk in stream]
    assert (chunk.token_ids, chunk.finish_reason) == ((5,), FinishReason.ABORT)


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, Refused), (413, Refused), *((status, RequestFailed) for status in (401, 403, 429, 500, 503))],
)
@pytest.mark.parametrize("streams", [False, True], ids=["head", "event"])
async def test_whose_fault_a_failure_is(
    sglang: SglangHttp, server: FakeOwnServer, status: int, error: type[Exception], streams: bool
) -> None:
    body = {"error": {"message": "no such luck", "code": status}}
    server.answer = streaming(sent(body)) if streams else refusal(status, json.dumps(body).encode())
    with pytest.raises(error, match="no such luck"):
        await anext(sglang.generate({}))


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (sent({"output_ids": [5]}), "meta_info"),
        (sent({"meta_info": {"finish_reason": {"type": "abort", "status_code": "x"}}}), "ValueError"),
        (sent({"output_ids": 5, "meta_info": {}}), "TypeError"),
        (b"data: {torn\n\n", "DecodeError"),
        (b"x" * (33 << 20), "has a line of more than"),
    ],
    ids=["no meta_info", "status", "tokens", "torn", "long"],
)
async def test_an_answer_that_is_not_understood_is_named(
    sglang: SglangHttp, server: FakeOwnServer, answer: bytes, named: str
) -> None:
    server.answer = streaming(answer)
    with pytest.raises(RequestFailed, match=named):
        await anext(sglang.generate({}))


async def test_a_start_that_is_awaited_never_asks_for_health(sglang: SglangHttp, server: FakeOwnServer) -> None:
    """``/health`` fails while the engine holds still for a move, and would generate to find out."""

    async def answer(_http: web.Request) -> web.StreamResponse:
        return web.Response(status=503 if len(server.asked) < 3 else 200)

    server.answer = answer
    await sglang.until_ready()
    assert [asked.path for asked in server.asked] == ["/model_info"] * 3


async def test_an_idle_connection_is_not_used_again(sglang: SglangHttp, server: FakeOwnServer) -> None:
    """SGLang closes those when it likes."""
    connections: set[object] = set()

    async def answer(http: web.Request) -> web.StreamResponse:
        connections.add(http.transport)
        return web.json_response({})

    server.answer = answer
    for _ in range(3):
        assert [event async for event in sglang.generate({})] == []
    assert len(connections) == 3


async def test_requests_are_ended_with_the_key_that_may(sglang: SglangHttp, server: FakeOwnServer) -> None:
    """Where SGLang has an admin key, it takes no other for that."""
    await sglang.abort("some")
    (asked,) = server.asked
    assert (asked.path, asked.headers["Authorization"]) == ("/abort_request", "Bearer a")


@pytest.mark.parametrize("page_tokens", [1, 16])
def test_a_kv_cache_that_is_smaller_than_asked_for_is_no_start(page_tokens: int) -> None:
    options = SglangOptions(
        python="python",
        model_directory="model",
        device_ids=("cpu:0",),
        num_decoders=8,
        kv_bytes_per_token=512,
        kv_cache_bytes=8 * 512 * 1600,
        kv_block_tokens=page_tokens,
    )
    there = {"num_kv_blocks": 1600 // page_tokens, "kv_block_tokens": page_tokens}
    ensure_room(options, there)
    short = there | {"num_kv_blocks": there["num_kv_blocks"] - 1}
    words = (
        rf"engines\.sglang\.kv_cache: there is memory for {1600 - page_tokens} tokens of KV cache, 1600 are asked for"
    )
    with pytest.raises(EngineStartFailed, match=words):
        ensure_room(options, short)
