"""A client that leaves frees everything its request held, whenever it leaves."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec
import pytest

from flexpiped.admission import AdmissionLimits
from flexpiped.keys import ANYBODY
from tests.support.http_app import FakeEngines, HttpApp, http_app, saying
from tests.support.until import until

pytestmark = pytest.mark.real_loop


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=saying("", then=[40, 41]))) as app:
        yield app


class RawClient:
    """A connection that sends a request and can be cut at any moment."""

    def __init__(self, app: HttpApp) -> None:
        parts = urlsplit(app.url)
        self._address = (parts.hostname or "", parts.port or 0)
        self.socket = socket.socket()
        self.socket.setblocking(False)

    async def send(self, *, stream: bool, path: str = "/v1/completions") -> None:
        await asyncio.get_running_loop().sock_connect(self.socket, self._address)
        field = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        body = msgspec.json.encode({**field, "stream": stream, "max_tokens": 200})
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        await asyncio.get_running_loop().sock_sendall(self.socket, head + body)

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.socket, 4096)

    def leave(self, *, reset: bool) -> None:
        if reset:  # RST in place of FIN: what a killed client leaves
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_leaving_during_the_prefill(app: HttpApp, stream: bool, reset: bool) -> None:
    app.engines.last.hold()
    client = RawClient(app)
    await client.send(stream=stream)
    await until(lambda: app.backend.admission.tokens_in_flight > 0)
    client.leave(reset=reset)
    await app.becomes_idle()
    assert (await app.engines.last.counters()).generated_tokens_total == 0


@pytest.mark.parametrize("reset", [False, True], ids=["fin", "rst"])
async def test_leaving_in_mid_stream(reset: bool) -> None:
    engines = FakeEngines(next_token=saying("", then=[40]), step_s=0.002)
    async with http_app(engines=engines) as app:
        client = RawClient(app)
        await client.send(stream=True)
        while b"data: " not in await client.receive():
            pass
        client.leave(reset=reset)
        await app.becomes_idle()
        assert (await app.engines.last.counters()).generated_tokens_total < 200


async def test_leaving_while_the_engine_recovers(app: HttpApp) -> None:
    app.engines.last.hold()
    client = RawClient(app)
    await client.send(stream=True)
    await until(lambda: app.backend.admission.tokens_in_flight > 0)
    app.engines.last.kill("gone")
    client.leave(reset=True)
    await until(lambda: len(app.engines.made) == 2 and bool(app.backend.serving.engines))
    await app.becomes_idle()


async def leave_at_random(app: HttpApp, *, clients: int, at_once: int) -> None:
    """Let clients hang up at random moments: waiting for their turn, in the prefill, in mid-stream, at the end."""
    rng = random.Random(0)

    async def visit() -> None:
        client = RawClient(app)
        path = rng.choice(["/v1/completions", "/v1/chat/completions"])
        await client.send(stream=rng.random() < 0.7, path=path)
        for _ in range(rng.randrange(0, 40)):  # so many turns of the event loop
            await asyncio.sleep(0)
        if rng.random() < 0.5:
            await client.receive()
        client.leave(reset=rng.random() < 0.5)

    for _ in range(0, clients, at_once):
        await asyncio.gather(*(visit() for _ in range(at_once)))
    await app.becomes_idle(within_s=30.0)
    assert app.backend.admission.in_flight_of(ANYBODY) == 0
    rendered = app.backend.metrics.render(None).decode()
    assert "flexpiped_requests_in_flight 0.0" in rendered


NARROW = AdmissionLimits(max_requests_in_flight=8, max_tokens_in_flight=1500, max_requests_queued=64)


async def test_300_clients_that_leave_at_random_leave_nothing_behind() -> None:
    engines = FakeEngines(next_token=saying("", then=[40, 41]))
    async with http_app(engines=engines, limits=NARROW) as app:
        await leave_at_random(app, clients=300, at_once=30)


@pytest.mark.long
async def test_10000_clients_that_leave_at_random_leave_nothing_behind() -> None:
    engines = FakeEngines(next_token=saying("", then=[40, 41]))
    async with http_app(engines=engines, limits=NARROW) as app:
        await leave_at_random(app, clients=10_000, at_once=50)
