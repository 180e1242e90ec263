"""Traces by OpenTelemetry, which only this module imports: the extra ``otel`` installs it.

A request is one span, with a span each for queue, prefill and decode in it, and for each handover that it lived
through. The context of a client's trace is taken from ``traceparent`` and ``tracestate``.

TracingUnavailable   traces are asked for, and the library is not installed
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import flexpiped
from flexpiped import log_events
from flexpiped.settings import TracingSettings
from flexpiped.tracing import HandoverTrace, RequestTrace, now_ns

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_SERVER_ERROR: Final = 500


class TracingUnavailable(Exception):
    """Traces are asked for, and cannot be made."""


class OtelSpans:
    """``Spans`` of a provider, whose processors decide what becomes of them."""

    def __init__(self, provider: "TracerProvider", *, model: str) -> None:
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._model = model
        self._tracer = provider.get_tracer("flexpiped", flexpiped.__version__)
        self._propagator = TraceContextTextMapPropagator()
        self._in_context, self._server, self._error = set_span_in_context, SpanKind.SERVER, StatusCode.ERROR
        self._open: dict[int, Any] = {}  # spans by the identity of their trace

    def begin(self, name: str, *, headers: Mapping[str, str], began_ns: int) -> RequestTrace:
        """Begin the span of a request."""
        parent = self._propagator.extract({key.lower(): value for key, value in headers.items()})
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=self._server,
            start_time=began_ns,
            attributes={"http.request.method": "POST", "gen_ai.request.model": self._model},
        )
        passed_on: dict[str, str] = {}
        self._propagator.inject(passed_on, context=self._in_context(span))
        trace = RequestTrace(name=name, headers=passed_on, began_ns=began_ns)
        self._open[id(trace)] = span
        return trace

    def end(self, trace: RequestTrace, *, status: int | None, handovers: tuple[HandoverTrace, ...]) -> None:
        """End it, with the spans in it."""
        span, ended_ns = self._open.pop(id(trace)), now_ns()
        if span.is_recording():
            self._add_phases(span, trace, ended_ns)
            for each in handovers:
                self._add(
                    span,
                    "handover",
                    max(each.began_ns, trace.began_ns),
                    min(each.ended_ns or ended_ns, ended_ns),
                    {"flexpiped.handover": each.number, "flexpiped.change": each.what, "flexpiped.result": each.result},
                )
            span.set_attributes(_attributes(trace, status))
            if trace.model:
                span.set_attribute("gen_ai.request.model", trace.model)
            if status is None or status >= _SERVER_ERROR:
                span.set_status(self._error, "the client left" if status is None else None)
        span.end(end_time=ended_ns)

    def close(self) -> None:
        """Send what has not been sent. Blocks, for seconds where nobody takes it."""
        self._provider.shutdown()

    def _add_phases(self, span: Any, trace: RequestTrace, ended_ns: int) -> None:
        """A phase that the request did not leave lasts as long as the request did."""
        begins = (("queue", trace.began_ns), ("prefill", trace.admitted_ns), ("decode", trace.first_token_ns))
        known = [(name, at_ns) for name, at_ns in begins if at_ns is not None]
        ends = [at_ns for _, at_ns in known[1:]] + [trace.last_token_ns or ended_ns]
        for (name, from_ns), to_ns in zip(known, ends, strict=True):
            self._add(span, name, from_ns, to_ns, {})

    def _add(self, parent: Any, name: str, from_ns: int, to_ns: int, attributes: Mapping[str, str | int]) -> None:
        child = self._tracer.start_span(
            name, context=self._in_context(parent), start_time=from_ns, attributes=attributes
        )
        child.end(end_time=max(from_ns, to_ns))


def _attributes(trace: RequestTrace, status: int | None) -> dict[str, int]:
    found = {
        "http.response.status_code": status,
        "gen_ai.usage.input_tokens": trace.prompt_tokens,
        "gen_ai.usage.output_tokens": trace.output_tokens,
    }
    return {name: value for name, value in found.items() if value is not None}


class _Complaints(logging.Handler):
    """What the library complains of is an event of our log."""

    def emit(self, record: logging.LogRecord) -> None:
        log_events.traces_not_sent(reason=record.getMessage())


def spans_of(settings: TracingSettings, *, model: str) -> OtelSpans | None:
    """Return what sends traces where ``settings`` say; None where they say nothing.

    Raises:
        TracingUnavailable
    """
    if settings.otlp_endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ImportError as error:
        raise TracingUnavailable(
            f"tracing.otlp_endpoint is set, but {error.name} is not installed: pip install 'flexpiped[otel]'"
        ) from None
    complaints = logging.getLogger("opentelemetry")
    complaints.handlers, complaints.propagate = [_Complaints(logging.WARNING)], False
    provider = TracerProvider(
        resource=Resource.create({"service.name": "flexpiped", "service.version": flexpiped.__version__}),
        sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
        shutdown_on_exit=False,
    )
    url = f"{settings.otlp_endpoint.rstrip('/')}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5)))
    return OtelSpans(provider, model=model)
