"""One trace per request, as OpenTelemetry's own in-memory exporter gets it; and by OTLP, as a collector does."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from flexpiped.events import EventKind, EventLog
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.settings import TracingSettings
from flexpiped.spans import OtelSpans, spans_of
from flexpiped.tracing import Handovers
from tests.support.fake_own_server import DONE, EVENTS, fake_own_server, streaming
from tests.support.http_app import CAPABILITIES, MODEL, FakeEngines, HttpApp, http_app, saying
from tests.support.unread import LEAST_BUFFER_BYTES, unread
from tests.support.until import until

pytest.importorskip("opentelemetry.sdk", reason="no opentelemetry: pip install 'flexpiped[otel]'")
pytestmark = pytest.mark.real_loop
CANARY = "a quokka whispered"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}


class Collected:
    """Spans as an exporter of the SDK's gets them, in memory."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._memory, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._memory))
        self.spans, self.handovers = OtelSpans(provider, model=MODEL), Handovers()

    @property
    def finished(self) -> list[Any]:
        return list(self._memory.get_finished_spans())

    def named(self, name: str) -> Any:
        (found,) = (span for span in self.finished if span.name == name)
        return found


@pytest.fixture
def collected() -> Collected:
    return Collected()


@pytest.fixture
async def app(collected: Collected) -> AsyncIterator[HttpApp]:
    engines = FakeEngines(next_token=saying("Once upon a time"))
    async with http_app(engines=engines, spans=collected.spans, handovers=collected.handovers) as app:
        yield app
        await app.becomes_idle()


@pytest.fixture
async def http(app: HttpApp) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(app.url) as session:
        yield session


async def complete(http: aiohttp.ClientSession, headers: dict[str, str] | None = None, **more: Any) -> int:
    body = {"prompt": CANARY, "max_tokens": 6, "ignore_eos": True, **more}
    async with http.post("/v1/completions", json=body, headers=headers) as answer:
        await answer.read()
        return answer.status


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_trace_of_its_phases(
    collected: Collected, http: aiohttp.ClientSession, stream: bool
) -> None:
    assert await complete(http, stream=stream) == 200
    request, *phases = (collected.named(name) for name in ("POST /v1/completions", "queue", "prefill", "decode"))

    assert len(collected.finished) == 4
    assert {phase.parent.span_id for phase in phases} == {request.context.span_id}
    times = [request.start_time, *(phase.end_time for phase in phases)]
    assert times == sorted(times)
    assert [phase.start_time for phase in phases] == times[:-1]  # one after the other, without a gap
    assert request.end_time >= times[-1]
    assert request.parent is None
    attributes = dict(request.attributes)
    assert attributes.pop("gen_ai.usage.input_tokens") > 0
    assert attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "gen_ai.request.model": MODEL,
        "gen_ai.usage.output_tokens": 6,
    }


async def test_a_clients_trace_goes_on(collected: Collected, http: aiohttp.ClientSession) -> None:
    assert await complete(http, TRACEPARENT) == 200
    request = collected.named("POST /v1/completions")

    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.context.trace_state["vendor"] == "x"


@pytest.mark.parametrize(
    "value", ["", "nonsense", "00-0-0-01", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"]
)
async def test_a_context_that_is_none_begins_a_trace(
    collected: Collected, http: aiohttp.ClientSession, value: str
) -> None:
    assert await complete(http, {"traceparent": value}) == 200
    assert collected.named("POST /v1/completions").parent is None


async def test_one_that_its_client_does_not_record_is_not_recorded(
    collected: Collected, http: aiohttp.ClientSession
) -> None:
    assert await complete(http, {"traceparent": f"00-{TRACE}-{PARENT}-00"}) == 200
    assert collected.finished == []


async def test_errors_have_their_status(collected: Collected, http: aiohttp.ClientSession) -> None:
    assert await complete(http, model="another") == 404
    request = collected.named("POST /v1/completions")
    assert (request.attributes["http.response.status_code"], request.status.is_ok) == (404, True)
    assert [span.name for span in collected.finished] == ["queue", "POST /v1/completions"]  # it came no further


async def test_a_client_that_leaves_ends_its_trace(
    collected: Collected, app: HttpApp, http: aiohttp.ClientSession
) -> None:
    app.engines.last.hold()
    leaving = asyncio.create_task(complete(http))
    await until(lambda: app.backend.admission.tokens_in_flight > 0)
    leaving.cancel()
    await until(lambda: len(collected.finished) > 0 and collected.finished[-1].name == "POST /v1/completions")
    request = collected.named("POST /v1/completions")
    assert (request.status.is_ok, request.status.description) == (False, "the client left")
    app.engines.last.release()


async def test_a_client_that_does_not_read_has_left(collected: Collected) -> None:
    engines = FakeEngines(next_token=saying("", then=[40]), capabilities=replace(CAPABILITIES, max_model_len=10_000))
    body = {"prompt": CANARY, "max_tokens": 9_000, "ignore_eos": True, "stream": True}
    async with (
        http_app(engines=engines, spans=collected.spans, send_buffer_bytes=LEAST_BUFFER_BYTES) as app,
        unread(app.url, body, headers={"X-Request-Deadline-Ms": "1500"}),
    ):
        await until(lambda: any(span.name == "POST /v1/completions" for span in collected.finished))
    assert collected.named("POST /v1/completions").status.description == "the client left"


async def test_nothing_but_what_generates_is_traced(collected: Collected, http: aiohttp.ClientSession) -> None:
    for path in ("/healthz", "/v1/models", "/metrics", "/v1/completions"):
        async with http.get(path):
            pass
    assert collected.finished == []


async def test_a_handover_is_in_the_traces_of_those_that_lived_through_it(
    collected: Collected, app: HttpApp, http: aiohttp.ClientSession
) -> None:
    events = EventLog(on_publish=collected.handovers.note)
    events.publish(EventKind.REFACTORING, "plan", handover=1, state="plan", what="2 -> 4 stages")
    events.publish(EventKind.REFACTORING, "ended", handover=1, state="ended", record={"result": "done"})
    app.engines.last.hold()
    running = asyncio.create_task(complete(http))
    await until(lambda: app.backend.admission.tokens_in_flight > 0)
    events.publish(EventKind.REFACTORING, "plan", handover=2, state="plan", what="4 -> 8 stages")
    events.publish(EventKind.REFACTORING, "ended", handover=2, state="ended", record={"result": "aborted"})
    events.publish(EventKind.REFACTORING, "plan", handover=3, state="plan", what="4 -> 1 stages")
    app.engines.last.release()
    assert await running == 200
    request, found = collected.named("POST /v1/completions"), [s for s in collected.finished if s.name == "handover"]

    assert [(span.attributes["flexpiped.change"], span.attributes["flexpiped.result"]) for span in found] == [
        ("4 -> 8 stages", "aborted"),
        ("4 -> 1 stages", ""),  # under way still
    ]
    for span in found:
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time


async def test_the_engines_own_server_gets_a_context_below_ours(collected: Collected, tmp_path: Path) -> None:
    async with (
        fake_own_server(tmp_path) as server,
        http_app(
            engines=FakeEngines(next_token=saying("ours"), own_socket=server.socket), spans=collected.spans
        ) as app,
        aiohttp.ClientSession(app.url) as http,
    ):
        assert await complete(http, TRACEPARENT, n=2) == 200
        server.answer = streaming(*EVENTS, DONE)
        assert await complete(http, n=2, stream=True) == 200
        first, second = server.asked
    requests = [span for span in collected.finished if span.name == "POST /v1/completions"]

    assert first.headers.getall("traceparent") == [f"00-{TRACE}-{requests[0].context.span_id:016x}-01"]
    assert first.headers.getall("tracestate") == ["vendor=x"]
    assert second.headers["traceparent"].split("-")[1] == f"{requests[1].context.trace_id:032x}"
    assert [f"{span.context.trace_id:032x}" == TRACE for span in requests] == [True, False]


async def test_without_tracing_a_clients_context_is_passed_on_as_it_is(tmp_path: Path) -> None:
    async with (
        fake_own_server(tmp_path) as server,
        http_app(engines=FakeEngines(next_token=saying("ours"), own_socket=server.socket)) as app,
        aiohttp.ClientSession(app.url) as http,
    ):
        assert await complete(http, TRACEPARENT, n=2) == 200
        (asked,) = server.asked
    assert {name: asked.headers[name] for name in TRACEPARENT} == TRACEPARENT


async def test_nothing_of_what_a_request_says_is_in_a_span(collected: Collected, http: aiohttp.ClientSession) -> None:
    await complete(http, stop=[CANARY])
    await complete(http, {"Authorization": "Bearer sk-secret"}, model=CANARY)
    said = " ".join(span.to_json() for span in collected.finished)

    assert len(collected.finished) > 4
    for secret in (CANARY, "quokka", "sk-secret", "Once upon"):
        assert secret not in said


async def test_a_collector_gets_them_by_otlp() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'flexpiped[otel]'")
    bodies: list[tuple[str, bytes]] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append((request.headers["Content-Type"], await request.read()))
        return web.Response()

    collector, listener = web.Application(), listen_tcp("127.0.0.1", 0)
    collector.add_routes([web.post("/v1/traces", take)])
    spans = spans_of(TracingSettings(otlp_endpoint=f"{url_of(listener)}/"), model=MODEL)
    assert spans is not None
    async with (
        serving(collector, listener, shutdown_s=1.0),
        http_app(engines=FakeEngines(next_token=saying("Once")), spans=spans) as app,
        aiohttp.ClientSession(app.url) as http,
    ):
        assert await complete(http) == 200
        await asyncio.to_thread(spans.close)
    ((content_type, body),) = bodies
    assert content_type == "application/x-protobuf"
    for word in (b"POST /v1/completions", b"queue", b"prefill", b"decode", b"flexpiped"):
        assert word in body


async def test_a_collector_that_is_away_disturbs_nobody() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'flexpiped[otel]'")
    with listen_tcp("127.0.0.1", 0) as taken:
        endpoint = url_of(taken)
    spans = spans_of(TracingSettings(otlp_endpoint=endpoint), model=MODEL)
    assert spans is not None
    async with http_app(spans=spans) as app, aiohttp.ClientSession(app.url) as http:
        assert [await complete(http) for _ in range(3)] == [200] * 3
    with capture_logs() as logged:
        logging.getLogger("opentelemetry.exporter").warning("nobody answers at %s", endpoint)
    assert logged == [{"event": "traces not sent", "reason": f"nobody answers at {endpoint}", "log_level": "warning"}]


def test_without_an_endpoint_there_are_none() -> None:
    assert spans_of(TracingSettings(), model=MODEL) is None
