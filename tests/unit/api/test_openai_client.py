"""The official ``openai`` client against the application, over a real socket."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from engines.protocol import GenerationRequest
from engines.restarts import RestartPolicy
from flexpiped.admission import AdmissionLimits
from flexpiped.keys import Client, KeyRing, Scope
from tests.support.http_app import CREATED_UNIX_S, MODEL, FakeEngines, HttpApp, http_app, ids_of, saying
from tests.support.until import until

pytestmark = pytest.mark.real_loop
TEXT = "Once 漢字 🙂 upon"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def app() -> AsyncIterator[HttpApp]:
    async with http_app(engines=FakeEngines(next_token=saying(TEXT))) as app:
        yield app
        await app.becomes_idle()


@pytest.fixture
async def client(app: HttpApp) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_completion(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt="Once", max_tokens=200)
    assert (answer.object, answer.model, answer.created) == ("text_completion", MODEL, CREATED_UNIX_S)
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids_of("Once")) + 1
    assert answer.usage.completion_tokens == len(ids_of(TEXT)) + 1  # the end token counts


async def test_completion_ends_with_length(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model=MODEL, prompt=[5, 6], max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
    }


async def test_streamed_completion(client: AsyncOpenAI) -> None:
    stream = await client.completions.create(
        model=MODEL, prompt="Once", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ids_of(TEXT)) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_chat(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)  # type: ignore[arg-type]
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids_of("user: hello\nassistant: ")) + 1


async def test_streamed_chat(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)  # type: ignore[call-overload]
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_the_streaming_helper_of_the_client(client: AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:  # type: ignore[arg-type]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == TEXT


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(client: AsyncOpenAI, stream: bool) -> None:
    """The text is cut before the stop string, and the tokens behind it do not count."""
    usage: dict[str, object] = {"stream_options": {"include_usage": True}} if stream else {}
    answer = await client.completions.create(  # type: ignore[call-overload]
        model=MODEL, prompt="x", max_tokens=200, stop=["never", "字 🙂"], stream=stream, **usage
    )
    chunks = [chunk async for chunk in answer] if stream else [answer]
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == "Once 漢"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(ids_of("Once 漢字 🙂"))


async def test_greedy_and_seeded_answers_repeat(client: AsyncOpenAI) -> None:
    for extra in ({"temperature": 0}, {"seed": 5}):
        answers = [
            await client.completions.create(model=MODEL, prompt="Once", max_tokens=20, extra_body=extra)
            for _ in range(2)
        ]
        assert answers[0].choices[0].text == answers[1].choices[0].text


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    card = await client.models.retrieve(MODEL)
    assert (card.id, card.owned_by, card.created) == (MODEL, "flexpiped", CREATED_UNIX_S)
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_errors_are_the_clients_own(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.completions.create(model=MODEL, prompt="x", suffix="y")
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "suffix",
        "unsupported_parameter",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="other", prompt="x")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 300}])
    assert (long.value.param, long.value.code) == ("messages", "context_length_exceeded")


async def test_an_error_after_the_stream_began_reaches_the_client() -> None:
    """The engine goes for good in mid-stream: the client raises its own error, and nothing is left behind."""
    engines = FakeEngines()

    def die(_request: GenerationRequest, position: int) -> int:
        if position == 5:
            engines.last.kill("no memory left")
        return 40

    engines.next_token = die
    async with (
        http_app(engines=engines, policy=RestartPolicy(max_deaths=1)) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
        with pytest.raises(openai.APIError, match="no memory left"):
            [chunk async for chunk in stream]
        await until(lambda: app.backend.admission.requests_in_flight == 0)
        assert app.backend.admission.tokens_in_flight == 0


async def test_a_retry_waits_as_it_is_told_and_is_served() -> None:
    """429 with Retry-After, then the client's own second try."""
    limits = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=0)
    async with (
        http_app(limits=limits) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=1) as client,
    ):
        app.engines.last.hold()
        first = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        began_s = asyncio.get_running_loop().time()
        second = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
        refused = b'flexpiped_requests_total{endpoint="completions",outcome="overloaded"} 1.0'
        await until(lambda: refused in app.backend.metrics.render(None))
        app.engines.last.release()
        assert (await second).choices[0].text == (await first).choices[0].text
        assert asyncio.get_running_loop().time() - began_s >= 1.0
        await app.becomes_idle()


async def test_without_retries_it_raises_what_it_has_for_each_status() -> None:
    limits = AdmissionLimits(max_requests_in_flight=1, max_requests_queued=0)
    async with (
        http_app(limits=limits, policy=RestartPolicy(max_deaths=1)) as app,
        AsyncOpenAI(base_url=f"{app.url}/v1", api_key="none", max_retries=0) as client,
    ):
        app.engines.last.hold()
        first = asyncio.create_task(client.completions.create(model=MODEL, prompt="x"))
        await until(lambda: app.backend.admission.tokens_in_flight > 0)
        with pytest.raises(openai.RateLimitError) as full:
            await client.completions.create(model=MODEL, prompt="x")
        assert (full.value.code, full.value.response.headers["Retry-After"]) == ("too_many_requests_in_flight", "1")
        app.engines.last.kill("no memory left")
        with pytest.raises(openai.InternalServerError):
            await first
        with pytest.raises(openai.InternalServerError) as gone:
            await client.completions.create(model=MODEL, prompt="x")
        assert (gone.value.status_code, gone.value.response.headers["Retry-After"]) == (503, "5")


async def test_keys() -> None:
    digest = hashlib.sha256(b"sk-right").digest()
    ring = KeyRing(hashes=(digest,), clients=(Client(name="grafana", scopes=frozenset({Scope.READ})),))
    async with http_app(keys=lambda: ring) as app:
        for key, error in (("sk-right", openai.PermissionDeniedError), ("sk-wrong", openai.AuthenticationError)):
            async with AsyncOpenAI(base_url=f"{app.url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(error):
                    await client.completions.create(model=MODEL, prompt="x")


async def test_what_the_engine_has_not_is_not_found_with_a_reason(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no server of its own"):
        await client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.NotFoundError, match="no server of its own"):
        await client.responses.create(model=MODEL, input="x")


async def test_a_client_that_gives_up_frees_its_request(app: HttpApp, client: AsyncOpenAI) -> None:
    app.engines.last.hold()
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).completions.create(model=MODEL, prompt="x")
    await app.becomes_idle()
    app.engines.last.release()
    stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=200, stream=True)
    await anext(stream)
    await stream.close()  # in mid-stream


async def test_several_at_once(client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(client.completions.create(model=MODEL, prompt="Once", max_tokens=200) for _ in range(20))
    )
    assert {answer.choices[0].text for answer in answers} == {TEXT}
    assert len({answer.id for answer in answers}) == 20
