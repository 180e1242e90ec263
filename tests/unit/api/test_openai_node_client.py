"""The official ``openai`` client for Node against the application, over a real socket."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engines.protocol import GenerationRequest
from engines.restarts import RestartPolicy
from flexpiped.admission import AdmissionLimits
from flexpiped.api.tool_syntax import HERMES, ToolCalls
from tests.support.http_app import MODEL, RICH, FakeEngines, HttpApp, http_app, ids_of, saying
from tests.support.openai_node import packages, run_flow
from tests.support.tiny_tokenizer import byte_level_tokenizer
from tests.support.until import until

pytestmark = pytest.mark.real_loop
TEXT = "Once 漢字 🙂 upon"
FULL = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=0)


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=saying(TEXT))) as app:
        yield app
        await app.becomes_idle()


async def test_completions(app: HttpApp) -> None:
    found = await run_flow("completion", app.url)
    (choice,) = found["whole"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXT, "stop")
    assert (found["text"], found["several"]) == (TEXT, [TEXT, TEXT])
    assert found["usage"] == found["whole"]["usage"]
    assert found["usage"]["completion_tokens"] == len(ids_of(TEXT)) + 1


async def test_chats_and_models(app: HttpApp) -> None:
    found = await run_flow("chat", app.url)
    assert found["whole"]["choices"][0]["message"]["content"] == TEXT
    assert found["deltas"][0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in found["deltas"]) == TEXT
    assert found["final"]["choices"][0]["message"]["content"] == TEXT
    assert (found["listed"], found["one"]) == ([MODEL], MODEL)


async def test_tools_are_called_and_their_results_come_back() -> None:
    """By the client's own loop, whole and streamed: it calls what the model calls, and asks again with the results."""
    called, said = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>', "It is red."

    def next_token(request: GenerationRequest, position: int) -> int:
        has_result = "painted" in byte_level_tokenizer().decode(list(request.prompt_token_ids))
        return saying(said if has_result else called)(request, position)

    engines = FakeEngines(next_token=next_token, capabilities=replace(RICH, grammars=True, max_model_len=1024))
    async with http_app(engines=engines, tool_calls=ToolCalls(syntax=HERMES)) as app:
        found = await run_flow("tools", app.url)
        assert found == {"painted": [{"colour": "red"}] * 2, "contents": [said] * 2}
        await app.becomes_idle()


async def test_errors_are_the_clients_own(app: HttpApp) -> None:
    found = await run_flow("errors", app.url)
    assert {name: (each["name"], each["status"], each["param"], each["code"]) for name, each in found.items()} == {
        "unknown": ("BadRequestError", 400, "suffix", "unsupported_parameter"),
        "model": ("NotFoundError", 404, "model", "model_not_found"),
        "long": ("BadRequestError", 400, "messages", "context_length_exceeded"),
        "route": ("NotFoundError", 404, None, "no_such_route"),
    }


@pytest.mark.long
async def test_full_is_a_rate_limit_and_a_retry_is_served() -> None:
    await packages()
    async with http_app(limits=FULL, engines=FakeEngines(next_token=saying(TEXT))) as app:
        app.engines.last.hold()
        first = asyncio.create_task(run_flow("retry", app.url))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        refusal = await run_flow("error", app.url)
        assert (refusal["name"], refusal["code"]) == ("RateLimitError", "too_many_requests_in_flight")
        second = asyncio.create_task(run_flow("retry", app.url))
        refused = b'flexpiped_requests_total{endpoint="completions",outcome="overloaded"} 2.0'
        await until(lambda: refused in app.backend.metrics.render(None))
        app.engines.last.release()
        assert await first == await second
        await app.becomes_idle()


async def test_an_engine_that_is_gone_is_503_with_when_to_come_back() -> None:
    await packages()
    async with http_app(policy=RestartPolicy(max_deaths=1)) as app:
        app.engines.last.kill("no memory left")
        await until(lambda: app.backend.health().state.value == "failed")
        found = await run_flow("error", app.url)
        assert (found["name"], found["status"], found["retryAfter"]) == ("InternalServerError", 503, "5")


async def test_a_client_that_aborts_or_gives_up_frees_its_request() -> None:
    async with http_app(engines=FakeEngines(step_s=0.05)) as app:
        found = await run_flow("abort", app.url)
        assert (found["chunks"] >= 2, found["timedOut"]) == (True, "APIConnectionTimeoutError")
        await app.becomes_idle()
