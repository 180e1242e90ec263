"""The application over a real socket, where the client library hides what happens."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from engines.protocol import GenerationRequest
from engines.restarts import RestartPolicy
from engines.text.local import LocalText, PlainTokenizer
from flexpiped.admission import AdmissionLimits
from tests.support.http_app import MODEL, FakeEngines, HttpApp, http_app, ids_of, saying
from tests.support.tiny_tokenizer import byte_level_tokenizer
from tests.support.until import until

pytestmark = pytest.mark.real_loop
TEXT = "Once upon a time there was"


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=saying(TEXT))) as app:
        yield app
        await app.becomes_idle()


def body(**extra: Any) -> dict[str, Any]:
    return {"prompt": "Once", "max_tokens": 200, **extra}


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    assert response.content_type == "application/json"
    answer = await response.json()
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = answer["error"]
    return error


async def text_of_events(response: aiohttp.ClientResponse) -> str:
    """Return the streamed text; the last event must be [DONE]."""
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *events, done, rest = (await response.text()).split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return "".join(json.loads(event[6:])["choices"][0]["text"] for event in events)


async def test_the_curl_of_the_readme(app: HttpApp, session: aiohttp.ClientSession) -> None:
    request = {"prompt": "Once", "max_tokens": 200, "stream": True}
    async with session.post(f"{app.url}/v1/completions", json=request) as response:
        assert response.status == 200
        assert await text_of_events(response) == TEXT


async def test_max_tokens_defaults_to_16_for_completions(session: aiohttp.ClientSession) -> None:
    engines = FakeEngines(next_token=saying("", then=[40]))
    async with http_app(engines=engines) as app:
        async with session.post(f"{app.url}/v1/completions", json={"prompt": "Once"}) as response:
            usage = (await response.json())["usage"]
        assert usage["completion_tokens"] == 16
        chat = {"messages": [{"role": "user", "content": "x"}]}
        async with session.post(f"{app.url}/v1/chat/completions", json=chat) as response:
            usage = (await response.json())["usage"]
        assert usage["total_tokens"] == 256


async def test_the_prompt_token_ids_reach_the_engine_as_they_are(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.post(f"{app.url}/v1/completions", json=body(prompt=[[7, 8, 9]])) as response:
        assert (await response.json())["usage"]["prompt_tokens"] == 3


async def test_a_stop_token_ends_the_text_and_has_none(app: HttpApp, session: aiohttp.ClientSession) -> None:
    token_ids = ids_of(TEXT)
    for extra, shown in (({"stop_token_ids": [token_ids[2]]}, token_ids[:2]), ({}, token_ids)):
        async with session.post(f"{app.url}/v1/completions", json=body(**extra)) as response:
            answer = await response.json()
        assert answer["choices"][0]["text"] == byte_level_tokenizer().decode(shown)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(shown) + 1


async def test_ignore_eos_goes_on_to_the_limit(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.post(f"{app.url}/v1/completions", json=body(ignore_eos=True, max_tokens=50)) as response:
        answer = await response.json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (TEXT, "length")
    assert answer["usage"]["completion_tokens"] == 50


@pytest.mark.parametrize(
    ("raw", "status", "param"),
    [
        pytest.param(b"{", 400, None, id="bad json"),
        pytest.param(b'{"prompt": "x", "logprobs": 2}', 400, "logprobs", id="unsupported"),
        pytest.param(b'{"prompt": "x", "stream": true, "max_tokens": 1000}', 400, "max_tokens", id="context"),
        pytest.param(b'{"prompt": [600]}', 400, "prompt", id="vocabulary"),
        pytest.param(b'{"prompt": []}', 400, "prompt", id="empty"),
        pytest.param(b'{"prompt": "x", "model": "other"}', 404, "model", id="model"),
        pytest.param(b'{"prompt": "' + b"x" * (1 << 20) + b'"}', 413, None, id="body too large"),
    ],
)
async def test_refusals(
    app: HttpApp, session: aiohttp.ClientSession, raw: bytes, status: int, param: str | None
) -> None:
    async with session.post(f"{app.url}/v1/completions", data=io.BytesIO(raw)) as response:
        assert response.status == status
        assert (await error_of(response))["param"] == param


async def test_paths_and_methods(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{app.url}/v1/nothing") as response:
        assert response.status == 404
        assert (await error_of(response))["message"] == "GET /v1/nothing: 404: Not Found"
    async with session.get(f"{app.url}/v1/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        await error_of(response)


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(app: HttpApp) -> None:
    host, port = app.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
    async with asyncio.timeout(10.0):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()


async def test_a_body_that_does_not_decompress(app: HttpApp, session: aiohttp.ClientSession) -> None:
    headers = {"Content-Encoding": "gzip"}
    async with session.post(f"{app.url}/v1/completions", data=b"no gzip", headers=headers) as response:
        assert response.status == 400
        assert (await error_of(response))["message"] == "the body cannot be read: it is no gzip, or ends early"


async def test_a_model_without_a_chat_template(session: aiohttp.ClientSession) -> None:
    text = LocalText(PlainTokenizer(byte_level_tokenizer(), has_chat_template=False))
    async with http_app(text=text) as app:
        chat = {"messages": [{"role": "user", "content": "x"}]}
        async with session.post(f"{app.url}/v1/chat/completions", json=chat) as response:
            assert response.status == 400
            assert "no chat template" in (await error_of(response))["message"]


async def test_full_is_429_with_retry_after(session: aiohttp.ClientSession) -> None:
    async with http_app(limits=AdmissionLimits(max_requests_in_flight=1)) as app:
        app.engines.last.hold()
        url = f"{app.url}/v1/completions"
        first = asyncio.create_task(session.post(url, json=body()))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        async with session.post(url, json=body()) as response:
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            error = await error_of(response)
            assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests_in_flight")
        app.engines.last.release()
        async with await first as response:
            assert response.status == 200
        await app.becomes_idle()


async def test_the_token_budget_is_429(session: aiohttp.ClientSession) -> None:
    async with http_app(limits=AdmissionLimits(max_tokens_in_flight=250)) as app:
        app.engines.last.hold()
        url = f"{app.url}/v1/completions"
        first = asyncio.create_task(session.post(url, json=body()))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        async with session.post(url, json=body()) as response:
            assert response.status == 429
            assert (await error_of(response))["code"] == "token_budget_exhausted"
        app.engines.last.release()
        (await first).release()
        await app.becomes_idle()


async def test_a_stream_goes_on_when_the_engine_dies(session: aiohttp.ClientSession) -> None:
    engines = FakeEngines()
    says = saying(TEXT)

    def die_once(request: GenerationRequest, position: int) -> int:
        if position == 5 and len(engines.made) == 1:
            engines.last.kill("killed by the test")
        return says(request, position)

    engines.next_token = die_once
    async with http_app(engines=engines) as app:
        async with session.post(f"{app.url}/v1/completions", json=body(stream=True)) as response:
            assert await text_of_events(response) == TEXT
        assert len(engines.made) == 2
        await app.becomes_idle()


async def test_probes(session: aiohttp.ClientSession) -> None:
    async with http_app(policy=RestartPolicy(max_deaths=1)) as app:
        async with session.get(f"{app.url}/healthz") as response:
            assert (response.status, await response.json()) == (200, {"status": "alive"})
        async with session.get(f"{app.url}/readyz") as response:
            assert (response.status, (await response.json())["status"]) == (200, "ready")
        app.engines.last.kill("no memory left")
        await until(lambda: not app.backend.serving.engines)
        async with session.get(f"{app.url}/readyz") as response:
            assert response.status == 503
            answer = await response.json()
            assert answer["status"] == "failed"
            assert "no memory left" in answer["reason"]
        async with session.post(f"{app.url}/v1/completions", json=body()) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "5"
            assert "no memory left" in (await error_of(response))["message"]
        async with session.get(f"{app.url}/healthz") as response:
            assert response.status == 200
        async with session.get(f"{app.url}/metrics") as response:
            assert response.status == 200
            assert "flexpiped_engine" not in await response.text()


async def test_metrics(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.post(f"{app.url}/v1/completions", json=body()) as response:
        assert response.status == 200
    async with session.post(f"{app.url}/v1/completions", json=body(logprobs=2)) as response:
        assert response.status == 400
    async with session.get(f"{app.url}/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        lines = (await response.text()).splitlines()
    generated = len(ids_of(TEXT)) + 1
    for line in (
        'flexpiped_requests_total{endpoint="completions",outcome="done"} 1.0',
        'flexpiped_requests_total{endpoint="completions",outcome="refused"} 1.0',
        f"flexpiped_request_completion_tokens_total {generated}.0",
        f"flexpiped_engine_generated_tokens_total {generated}.0",
        "flexpiped_engine_kv_blocks_used 0.0",
        "flexpiped_time_to_first_token_seconds_count 1.0",
    ):
        assert line in lines


async def test_model_ids_may_hold_slashes(app: HttpApp, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{app.url}/v1/models/{MODEL}") as response:
        assert (await response.json())["id"] == MODEL
