"""Stands for the OpenAI server that an engine brings along: on a Unix socket, it remembers what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiohttp import web
from multidict import CIMultiDictProxy

from engines.fake import FakeEngine
from engines.protocol import EngineCapabilities
from engines.vllm.own_server import own_server
from engines.vllm.sampling import ENGINE_PARAMS

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
EVENTS = (b'data: {"choices":[{"text":"a"}]}\n\n', b'data: {"choices":[{"text":"b"}]}\n\n')
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"total_tokens":9,"completion_tokens":6}}\n\n'
DONE = b"data: [DONE]\n\n"
WHOLE = b'{"choices": [{"text": "a"}, {"text": "b"}],  "usage": {"prompt_tokens": 3, "completion_tokens": 6}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as it came."""

    path: str
    headers: CIMultiDictProxy[str]
    body: bytes


@dataclass(kw_only=True)
class FakeOwnServer:
    """``answer`` is what requests get from then on; ``open`` counts those that are being answered."""

    socket: Path
    answer: Answer
    asked: list[Asked] = field(default_factory=list)
    open: int = 0

    async def handle(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(Asked(path=http.path_qs, headers=http.headers, body=await http.read()))
        self.open += 1
        try:
            return await self.answer(http)
        finally:
            self.open -= 1


class EngineWithServer(FakeEngine):
    own_routes_socket = Path()  # set by whoever makes it
    own_routes_key = ""


def with_server(capabilities: EngineCapabilities, *, args: tuple[str, ...] = ()) -> EngineCapabilities:
    """Return the capabilities of an engine that is like vLLM in what it takes and in what its server knows."""
    return replace(capabilities, name="vllm", engine_params=ENGINE_PARAMS, own_server=own_server(args))


async def whole(_http: web.Request) -> web.StreamResponse:
    return web.Response(body=WHOLE, content_type="application/json", headers={"X-Kept": "yes", "Server": "uvicorn"})


def refusal(status: int, body: bytes) -> Answer:
    async def answer(_http: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, content_type="application/json")

    return answer


def streaming(*pieces: bytes, then: Callable[[web.Request], Awaitable[None]] | None = None) -> Answer:
    """Return an answer that sends ``pieces`` one by one, does ``then``, and ends."""

    async def answer(http: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0)
        if then is not None:
            await then(http)
        return response

    return answer


async def for_ever(_http: web.Request) -> None:
    await asyncio.Event().wait()


async def cut(http: web.Request) -> None:
    """End the connection as a process does that is killed."""
    assert http.transport is not None
    http.transport.abort()


@asynccontextmanager
async def fake_own_server(directory: Path, *, answer: Answer = whole) -> AsyncIterator[FakeOwnServer]:
    """Serve every path on a socket in ``directory`` while the scope lasts."""
    server = FakeOwnServer(socket=directory / "http.sock", answer=answer)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(server.socket)).start()
        yield server
    finally:
        await runner.cleanup()
