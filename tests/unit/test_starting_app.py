"""What the HTTP port answers before the engine is ready."""

import aiohttp
import pytest

from flexpiped.servers import PortTaken, base_url, listen_tcp, serving, url_of
from flexpiped.starting_app import starting_app
from flexpiped.status import Health, ServiceState

pytestmark = pytest.mark.real_loop


async def test_alive_but_not_serving_and_why() -> None:
    app = starting_app(lambda: Health(state=ServiceState.STARTING, reason="loading weights"))
    listener = listen_tcp("127.0.0.1", 0)
    async with serving(app, listener, shutdown_s=1.0), aiohttp.ClientSession(url_of(listener)) as session:
        async with session.get("/healthz") as answer:
            assert answer.status == 200
        for path in ("/readyz", "/v1/models", "/"):
            async with session.get(path) as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
                error = (await answer.json())["error"]
                assert (error["message"], error["code"]) == ("starting: loading weights", "starting")
                assert error["type"] == "service_unavailable_error"


def test_a_taken_port_says_what_to_do() -> None:
    with listen_tcp("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use\. Choose"):
            listen_tcp("127.0.0.1", port)


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(PortTaken, match=r"http\.host no such host"):
        listen_tcp("no such host", 1)


def test_addresses_become_urls() -> None:
    assert (base_url("127.0.0.1", 80), base_url("::1", 80)) == ("http://127.0.0.1:80", "http://[::1]:80")
