"""Traces of a real daemon: what a collector gets of it, and what is said where the library is missing."""

from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from flexpiped.servers import listen_tcp, serving, url_of
from tests.support.daemon import spawn, started, write_config

pytestmark = pytest.mark.real_loop


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
            body = {"prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True}
            async with session.post(f"{url}/completions", json=body) as answer:
                await answer.content.readline()
                code, out, err = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
                assert code == 0, out + err
                await answer.read()
        daemon.process.terminate()
        assert await daemon.process.wait() == 0
    told = b"".join(bodies)
    for word in (b"POST /v1/completions", b"queue", b"prefill", b"decode"):
        assert word in told
    assert b"Once" not in told


async def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    hidden = tmp_path / "first" / "opentelemetry"  # a package of that name with nothing in it
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").touch()
    config = write_config(tmp_path, more='tracing.otlp_endpoint = "http://127.0.0.1:4318"\n')
    process = await spawn(config, tmp_path / "output.log", PYTHONPATH=str(hidden.parent))

    assert await process.wait() == 1
    assert "is not installed: pip install 'flexpiped[otel]'" in (tmp_path / "output.log").read_text()
