"""Traces of a real daemon: what a collector gets of it, and what is said where the library is missing."""

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from flexpiped.servers import listen_tcp, serving, url_of
from tests.support.daemon import completed, spawn, started, write_config

pytestmark = pytest.mark.real_loop


def spans_in(bodies: list[bytes]) -> list[Any]:
    """Return the spans that came, as OTLP has them."""
    wire = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    sent = [wire.ExportTraceServiceRequest.FromString(body) for body in bodies]
    return [
        span
        for request in sent
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


async def test_a_collector_gets_the_traces_of_a_daemon(tmp_path: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="pip install 'flexpiped[otel]'")
    bodies: list[bytes] = []

    async def take(request: web.Request) -> web.Response:
        bodies.append(await request.read())
        return web.Response()

    collector, listener = web.Application(), listen_tcp("127.0.0.1", 0)
    collector.add_routes([web.post("/v1/traces", take)])
    more = f'tracing.otlp_endpoint = "{url_of(listener)}"\n'
    async with serving(collector, listener, shutdown_s=1.0), started(tmp_path, ready=True, more=more) as daemon:
        url = (await daemon.ask("/status"))["api_url"]
        async with aiohttp.ClientSession() as session:
            await completed(session, url, {"prompt": "Once", "max_tokens": 3})
            body = {"prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}
            async with session.post(f"{url}/completions", json=body) as answer:  # left when the layout has changed
                await answer.content.readline()
                code, out, err = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
                assert code == 0, out + err
        daemon.process.terminate()
        assert await daemon.process.wait() == 0
    spans = spans_in(bodies)
    requests = [each for each in spans if each.name == "POST /v1/completions"]
    whole, left = sorted(requests, key=lambda each: each.start_time_unix_nano)
    assert names_in(spans, whole) == ["decode", "prefill", "queue"]
    assert names_in(spans, left) == ["decode", "handover", "prefill", "queue"]
    [handover] = [each for each in spans if each.name == "handover"]
    told = {each.key: each.value.string_value for each in handover.attributes}
    assert (told["flexpiped.change"], told["flexpiped.result"]) == ("2 -> 4 stages", "done")
    assert b"Once" not in b"".join(bodies)


def names_in(spans: list[Any], request: Any) -> list[str]:
    return sorted(each.name for each in spans if each.parent_span_id == request.span_id)


async def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "first" / "opentelemetry"  # a package of that name with nothing in it
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    config = write_config(tmp_path, more='tracing.otlp_endpoint = "http://127.0.0.1:4318"\n')
    process = await spawn(config, tmp_path / "output.log", PYTHONPATH=str(hidden.parent))

    assert await process.wait() == 1
    assert "is not installed: pip install 'flexpiped[otel]'" in (tmp_path / "output.log").read_text()
