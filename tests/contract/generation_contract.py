"""The contract of generation: which tokens come, how they end, what is freed, which requests are refused by name."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from engines.closing import closing
from engines.errors import InvalidRequest
from engines.protocol import Engine, FinishReason, GenerationRequest
from tests.contract.contract_requests import PROMPT, assert_idle, chunks_of, request_of, tokens_of

# A value of each parameter that only some engines have.
ENGINE_PARAMS: dict[str, Any] = {
    "allowed_token_ids": list(range(3, 60)),
    "bad_words": ["never"],
    "frequency_penalty": 0.5,
    "logit_bias": {"7": 1.5},
    "min_p": 0.1,
    "min_tokens": 2,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.2,
}


def ensure_top_logprobs(engine: Engine) -> None:
    """Skip where the engine does not report them."""
    if not engine.capabilities.top_logprobs:
        pytest.skip(f"{engine.capabilities.name} reports the log-probability of the chosen token only")


class GenerationContract:
    """With the fixture ``engine`` (``engine_contract``)."""

    # Generation.

    async def test_greedy_is_deterministic(self, engine: Engine) -> None:
        first = await tokens_of(engine, request_of())
        assert first == await tokens_of(engine, request_of())
        assert all(0 <= token < engine.capabilities.vocab_size for token in first)

    async def test_greedy_ignores_the_seed(self, engine: Engine) -> None:
        assert await tokens_of(engine, request_of(seed=1)) == await tokens_of(engine, request_of(seed=2))

    @pytest.mark.parametrize("max_tokens", [1, 2, 17])
    async def test_max_tokens_ends_it_with_length(self, engine: Engine, max_tokens: int) -> None:
        chunks = await chunks_of(engine, request_of(max_tokens=max_tokens))
        assert sum(len(chunk.token_ids) for chunk in chunks) == max_tokens
        assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].finish_reason is FinishReason.LENGTH

    async def test_the_end_of_the_context_ends_it_with_length(self, engine: Engine) -> None:
        limit = engine.capabilities.max_model_len
        vocab = min(engine.capabilities.vocab_size, 64)
        prompt = tuple(3 + i % (vocab - 3) for i in range(limit - 5))
        chunks = await chunks_of(engine, request_of(prompt, max_tokens=limit))
        assert sum(len(chunk.token_ids) for chunk in chunks) == 5
        assert chunks[-1].finish_reason is FinishReason.LENGTH

    async def test_a_stop_token_ends_it_and_is_included(self, engine: Engine) -> None:
        undisturbed = await tokens_of(engine, request_of())
        stop = undisturbed[7]
        expected = undisturbed[: undisturbed.index(stop) + 1]
        chunks = await chunks_of(engine, request_of(stop_token_ids=(stop,)))
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == expected
        assert chunks[-1].finish_reason is FinishReason.STOP

    @pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
    @pytest.mark.parametrize("already", [1, 5, 23])
    async def test_resuming_gives_the_same_continuation(self, engine: Engine, temperature: float, already: int) -> None:
        if temperature and not engine.capabilities.resumes_seeded:
            pytest.skip(f"{engine.capabilities.name} carries no state of a sampler: a seeded draw goes on differently")
        request = request_of(temperature=temperature, seed=42)
        whole = await tokens_of(engine, request)
        chunks = await chunks_of(engine, replace(request, generated_token_ids=whole[:already]))
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == whole[already:]
        assert chunks[-1].finish_reason is FinishReason.LENGTH

    async def test_seeded_sampling_is_reproducible(self, engine: Engine) -> None:
        first = await tokens_of(engine, request_of(temperature=1.0, seed=7))
        assert first == await tokens_of(engine, request_of(temperature=1.0, seed=7))
        others = [await tokens_of(engine, request_of(temperature=1.0, seed=seed)) for seed in range(8, 12)]
        assert any(other != first for other in others)

    async def test_logprobs_come_with_every_token_when_asked_for(self, engine: Engine) -> None:
        for wanted in (True, False):
            for chunk in await chunks_of(engine, request_of(logprobs=wanted)):
                assert len(chunk.logprobs) == (len(chunk.token_ids) if wanted else 0)

    async def test_the_likeliest_tokens_come_with_every_token_when_asked_for(self, engine: Engine) -> None:
        ensure_top_logprobs(engine)
        sampling = replace(request_of(max_tokens=9, logprobs=True).sampling, top_logprobs=3)
        plain = await tokens_of(engine, request_of(max_tokens=9))
        chunks = await chunks_of(engine, replace(request_of(), sampling=sampling))
        assert tuple(token for chunk in chunks for token in chunk.token_ids) == plain
        for chunk in chunks:
            assert len(chunk.top_logprobs) == len(chunk.token_ids)
            for token, logprob, top in zip(chunk.token_ids, chunk.logprobs, chunk.top_logprobs, strict=True):
                assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)
                assert len({each for each, _ in top}) == 3
                assert top[0] == (token, pytest.approx(logprob, abs=1e-5))  # greedy

    @pytest.mark.parametrize("count", [0, 2])
    async def test_the_prompts_tokens_are_scored_once_when_asked_for(self, engine: Engine, count: int) -> None:
        ensure_top_logprobs(engine)
        sampling = replace(request_of(max_tokens=5).sampling, prompt_logprobs=count)
        first, *others = await chunks_of(engine, replace(request_of(), sampling=sampling))
        assert [each.token_id for each in first.prompt_logprobs] == list(PROMPT[1:])
        assert all(len(each.top) == count and each.rank >= 1 for each in first.prompt_logprobs)
        assert all(chunk.prompt_logprobs == () for chunk in others)

    async def test_a_resumed_request_does_not_score_its_prompt_again(self, engine: Engine) -> None:
        ensure_top_logprobs(engine)
        sampling = replace(request_of(max_tokens=5).sampling, prompt_logprobs=1)
        whole = await tokens_of(engine, request_of(max_tokens=5))
        resumed = replace(request_of(), sampling=sampling, generated_token_ids=whole[:2])
        assert all(chunk.prompt_logprobs == () for chunk in await chunks_of(engine, resumed))

    async def test_every_parameter_of_its_own_is_taken(self, engine: Engine) -> None:
        values = {name: ENGINE_PARAMS[name] for name in sorted(engine.capabilities.engine_params)}
        sampling = replace(request_of(max_tokens=6).sampling, engine_params=values)
        assert len(await tokens_of(engine, replace(request_of(), sampling=sampling))) == 6

    async def test_many_at_once_are_as_alone(self, engine: Engine) -> None:
        requests = [request_of((*PROMPT, 3 + i), temperature=float(i % 2), seed=i, max_tokens=4 + i) for i in range(24)]
        alone = [await tokens_of(engine, request) for request in requests]
        renamed = [replace(request, request_id=f"{request.request_id}-again") for request in requests]
        together = await asyncio.gather(*(tokens_of(engine, request) for request in renamed))
        assert together == alone
        await assert_idle(engine)

    # Ends before the end.

    async def test_closing_the_iterator_frees_the_request(self, engine: Engine) -> None:
        async with closing(engine.generate(request_of(max_tokens=200))) as chunks:
            async for _chunk in chunks:
                break
        await assert_idle(engine)

    async def test_cancelling_the_consumer_frees_the_request(self, engine: Engine) -> None:
        first_chunk = asyncio.Event()

        async def consume(request: GenerationRequest) -> None:
            async with closing(engine.generate(request)) as chunks:
                async for _chunk in chunks:
                    first_chunk.set()

        tasks = [asyncio.create_task(consume(request_of(max_tokens=200, seed=i))) for i in range(8)]
        await first_chunk.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await assert_idle(engine)

    async def test_closing_an_iterator_that_was_never_started(self, engine: Engine) -> None:
        async with closing(engine.generate(request_of())):
            pass
        await assert_idle(engine)

    # Requests that cannot be run.

    @pytest.mark.parametrize("case", ["empty", "too long", "out of vocabulary", "negative id", "no tokens wanted"])
    async def test_a_bad_request_is_refused_by_name(self, engine: Engine, case: str) -> None:
        capabilities = engine.capabilities
        request, parameter = {
            "empty": (request_of(()), "prompt"),
            "too long": (request_of((5,) * capabilities.max_model_len), "prompt"),
            "out of vocabulary": (request_of((5, capabilities.vocab_size)), "prompt"),
            "negative id": (request_of((5, -1)), "prompt"),
            "no tokens wanted": (request_of(max_tokens=0), "max_tokens"),
        }[case]
        with pytest.raises(InvalidRequest) as caught:
            await chunks_of(engine, request)
        assert caught.value.parameter == parameter
        await assert_idle(engine)

    async def test_an_unknown_parameter_of_the_engine_is_refused_by_name(self, engine: Engine) -> None:
        request = request_of()
        with_more = replace(request, sampling=replace(request.sampling, engine_params={"no_such": 1}))
        with pytest.raises(InvalidRequest, match="no_such") as caught:
            await chunks_of(engine, with_more)
        assert caught.value.parameter == "no_such"
        await assert_idle(engine)
