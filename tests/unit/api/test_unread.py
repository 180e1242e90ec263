"""A client that stays and reads nothing frees what its request holds, as one that leaves does."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from flexpiped.admission import AdmissionLimits
from flexpiped.keys import ANYBODY
from tests.support.fake_own_server import EVENTS, fake_own_server, streaming
from tests.support.http_app import CAPABILITIES, FakeEngines, HttpApp, http_app, saying
from tests.support.unread import LEAST_BUFFER_BYTES, rest_of, unread
from tests.support.until import until

pytestmark = pytest.mark.real_loop
MAX_TOKENS = 10_000
LONG = {"prompt": "x", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
OWN = LONG | {"n": 2}  # only the engine's own server has that
LIMITS = pytest.mark.parametrize(
    ("send_deadline_s", "headers"),
    [(0.2, {}), (math.inf, {"X-Request-Deadline-Ms": "1500"})],
    ids=["nothing taken", "its own deadline"],
)


def talkative() -> FakeEngines:
    capabilities = replace(CAPABILITIES, max_model_len=MAX_TOKENS + 50)
    return FakeEngines(next_token=saying("", then=[40]), capabilities=capabilities)


async def nothing_is_left(app: HttpApp) -> None:
    await app.becomes_idle()
    assert app.backend.admission.in_flight_of(ANYBODY) == 0
    shown = set(app.backend.metrics.render(None).decode().splitlines())
    assert {
        'flexpiped_requests_total{endpoint="completions",outcome="disconnected"} 1.0',
        "flexpiped_requests_in_flight 0.0",
    } <= shown


@LIMITS
async def test_of_a_stream_of_ours(send_deadline_s: float, headers: dict[str, str]) -> None:
    with capture_logs() as logs:
        async with (
            http_app(engines=talkative(), send_deadline_s=send_deadline_s, send_buffer_bytes=LEAST_BUFFER_BYTES) as app,
            unread(app.url, LONG, headers=headers) as client,
        ):
            await until(lambda: app.backend.admission.tokens_in_flight > 0)
            await nothing_is_left(app)
            rest = await rest_of(client)

    assert rest.startswith(b"HTTP/1.1 200 ")
    assert not rest.endswith(b"0\r\n\r\n")  # that would say that it is whole
    assert [each["event"] for each in logs] == ["client stopped reading, connection closed"]


@LIMITS
async def test_of_a_stream_of_the_engines_own_server(
    tmp_path: Path, send_deadline_s: float, headers: dict[str, str]
) -> None:
    async with fake_own_server(tmp_path, answer=streaming(*[EVENTS[0] * 100] * 10_000)) as server:
        engines = FakeEngines(own_socket=server.socket)
        async with (
            http_app(engines=engines, send_deadline_s=send_deadline_s, send_buffer_bytes=LEAST_BUFFER_BYTES) as app,
            unread(app.url, OWN, headers=headers) as client,
        ):
            await until(lambda: server.open == 1)
            await until(lambda: server.open == 0)
            await nothing_is_left(app)
            rest = await rest_of(client)

    assert rest.startswith(b"HTTP/1.1 200 ")
    assert not rest.endswith(b"0\r\n\r\n")


async def test_they_do_not_fill_the_daemon() -> None:
    limits = AdmissionLimits(max_requests_in_flight=2, max_requests_queued=1)
    served = http_app(engines=talkative(), limits=limits, send_deadline_s=0.2, send_buffer_bytes=LEAST_BUFFER_BYTES)
    async with served as app, unread(app.url, LONG), unread(app.url, LONG), unread(app.url, LONG):
        await until(lambda: app.backend.admission.requests_queued == 1)
        await app.becomes_idle()
