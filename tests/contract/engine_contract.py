"""The contract of ``engines.protocol.Engine``, as tests that every engine passes.

A test file subclasses ``EngineContract`` with these fixtures:

- ``engine``: a started engine. It may be shared by the tests of the class: each leaves it idle.
- ``disposable_engine``: a started engine that the test closes.
- ``targets``: at least two pipelines that differ from each other, none of them in force at first, all accepted.

What an engine cannot do by its ``capabilities`` is skipped.
"""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest

from engines.closing import closing
from engines.errors import EngineClosed, InvalidRequest, RefactoringBusy, RefactoringRefused
from engines.offers import KvResizing
from engines.protocol import Engine, FinishReason, GenerationRequest, RefactorProgress, SamplingParams, TokenChunk
from planner.handover import HandoverPhase
from planner.layout import Pipeline, Stage
from tests.support.until import until

FORWARD = [
    HandoverPhase.PREPARING,
    HandoverPhase.SYNCING,
    HandoverPhase.COMMITTING,
    HandoverPhase.RETIRING,
    HandoverPhase.DONE,
]
PROMPT = (5, 9, 17, 33)
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
_ids = itertools.count()


def request_of(
    prompt: tuple[int, ...] = PROMPT,
    *,
    max_tokens: int = 24,
    temperature: float = 0.0,
    seed: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    ignore_eos: bool = True,
    logprobs: bool = False,
) -> GenerationRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    return GenerationRequest(
        request_id=f"contract-{next(_ids)}", prompt_token_ids=prompt, sampling=sampling, generated_token_ids=generated
    )


async def chunks_of(engine: Engine, request: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(request)]


async def tokens_of(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    return tuple(token for chunk in await chunks_of(engine, request) for token in chunk.token_ids)


async def assert_idle(engine: Engine) -> None:
    """Nothing is left of any request: the leak check of every test that ends one early."""
    await engine.drain()
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


async def in_flight(engine: Engine) -> bool:
    counters = await engine.counters()
    return counters.running + counters.waiting > 0


async def ended(engine: Engine, refactorings_total: int) -> bool:
    return (await engine.counters()).refactorings_total == refactorings_total


def ensure_top_logprobs(engine: Engine) -> None:
    """Skip where the engine does not report them."""
    if not engine.capabilities.top_logprobs:
        pytest.skip(f"{engine.capabilities.name} reports the log-probability of the chosen token only")


def refactoring_of(engine: Engine, targets: tuple[Pipeline, ...]) -> Pipeline:
    """Return a target that is not in force, or skip."""
    if not engine.capabilities.refactors_in_place:
        pytest.skip(f"{engine.capabilities.name} does not refactor in place")
    return next(target for target in targets if target != engine.pipeline)


class EngineContract:
    """Subclassed once per engine."""

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

    # What it says of itself.

    async def test_counters_move(self, engine: Engine) -> None:
        before = await engine.counters()
        await tokens_of(engine, request_of(max_tokens=10))
        after = await engine.counters()
        assert after.prompt_tokens_total - before.prompt_tokens_total == len(PROMPT)
        assert after.generated_tokens_total - before.generated_tokens_total == 10
        assert after.steps_total > before.steps_total
        assert after.kv_block_tokens > 0
        assert after.kv_blocks_capacity * after.kv_block_tokens >= engine.capabilities.max_model_len

    async def test_counters_show_a_request_in_flight(self, engine: Engine) -> None:
        async with closing(engine.generate(request_of(max_tokens=400))) as chunks:
            await anext(chunks)
            counters = await engine.counters()
            assert counters.running + counters.waiting == 1
            assert counters.kv_blocks_used >= 1
        await assert_idle(engine)

    async def test_stages_cover_all_decoders(self, engine: Engine) -> None:
        stages = await engine.stages()
        described = Pipeline(
            stages=tuple(
                Stage(device_ids=s.device_ids, first_decoder=s.first_decoder, end_decoder=s.end_decoder) for s in stages
            )
        )
        assert described == engine.pipeline
        assert [stage.index for stage in stages] == list(range(len(stages)))

    # Refactoring.

    async def test_a_refactoring_reports_its_phases_in_order(
        self, engine: Engine, targets: tuple[Pipeline, ...]
    ) -> None:
        target = refactoring_of(engine, targets)
        epoch, total = engine.epoch, (await engine.counters()).refactorings_total
        assert (await engine.check_refactor(target)).feasible
        reports: list[RefactorProgress] = [report async for report in engine.refactor(target)]
        assert [phase for phase, _same in itertools.groupby(reports, key=lambda r: r.phase)] == FORWARD
        assert all(a.elapsed_s <= b.elapsed_s for a, b in itertools.pairwise(reports))
        assert engine.pipeline == target
        assert engine.epoch == epoch + 1 == reports[-1].epoch
        assert (await engine.counters()).refactorings_total == total + 1
        await self.test_stages_cover_all_decoders(engine)

    async def test_streams_across_refactorings_are_as_undisturbed(
        self, engine: Engine, targets: tuple[Pipeline, ...]
    ) -> None:
        refactoring_of(engine, targets)
        requests = [request_of((*PROMPT, 3 + i), temperature=float(i % 2), seed=i, max_tokens=60) for i in range(8)]
        undisturbed = [await tokens_of(engine, request) for request in requests]
        again = [replace(request, request_id=f"{request.request_id}-moved") for request in requests]
        streams = [asyncio.create_task(tokens_of(engine, request)) for request in again]
        for target in (targets[0], targets[1], targets[0]):
            if target != engine.pipeline:
                reports = [report async for report in engine.refactor(target)]
                assert reports[-1].phase is HandoverPhase.DONE
        assert await asyncio.gather(*streams) == undisturbed
        await assert_idle(engine)

    async def test_a_second_refactoring_is_busy(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        target = refactoring_of(engine, targets)
        async with closing(engine.refactor(target)) as reports:
            await anext(reports)
            with pytest.raises(RefactoringBusy):
                await anext(aiter(engine.refactor(target)))
            async for report in reports:
                last = report
        assert last.phase is HandoverPhase.DONE

    async def test_closing_the_reports_does_not_cancel(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        target = refactoring_of(engine, targets)
        epoch, total = engine.epoch, (await engine.counters()).refactorings_total
        async with closing(engine.refactor(target)) as reports:
            await anext(reports)
        assert await tokens_of(engine, request_of(max_tokens=2))
        await until(lambda: ended(engine, total + 1), timeout_s=60.0)
        assert (engine.pipeline, engine.epoch) == (target, epoch + 1)

    async def test_a_meaningless_layout_is_refused(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        refactoring_of(engine, targets)
        device = engine.pipeline.device_ids[0]
        short = engine.pipeline.num_decoders - 1
        wrong = Pipeline(stages=(Stage(device_ids=(device,), first_decoder=0, end_decoder=short),))
        epoch, pipeline = engine.epoch, engine.pipeline
        check = await engine.check_refactor(wrong)
        assert not check.feasible
        assert check.sentences
        with pytest.raises(RefactoringRefused):
            await anext(aiter(engine.refactor(wrong)))
        assert (engine.epoch, engine.pipeline) == (epoch, pipeline)

    async def test_there_is_nothing_to_cancel_when_idle(self, engine: Engine) -> None:
        assert await engine.cancel_refactor() is False

    # Another number of KV blocks.

    async def test_streams_go_on_as_undisturbed_while_the_kv_cache_shrinks_and_grows(self, engine: Engine) -> None:
        bounds = engine.capabilities.kv_range
        if bounds is None:
            pytest.skip(f"{engine.capabilities.name} does not change its KV cache")
        assert isinstance(engine, KvResizing)
        requests = [request_of((*PROMPT, 40 + index), max_tokens=60) for index in range(8)]
        expected = [await tokens_of(engine, each) for each in requests]
        streams = [asyncio.create_task(tokens_of(engine, each)) for each in requests]
        await until(lambda: in_flight(engine), timeout_s=60.0)
        for blocks in (bounds.least_blocks, bounds.most_blocks, bounds.least_blocks, bounds.most_blocks):
            await engine.resize_kv(blocks)
            assert (await engine.counters()).kv_blocks_capacity == blocks
        assert [await each for each in streams] == expected
        await assert_idle(engine)

    async def test_a_number_of_kv_blocks_out_of_range_is_refused(self, engine: Engine) -> None:
        bounds = engine.capabilities.kv_range
        if bounds is None:
            pytest.skip(f"{engine.capabilities.name} does not change its KV cache")
        assert isinstance(engine, KvResizing)
        for blocks in (bounds.least_blocks - 1, bounds.most_blocks + 1):
            with pytest.raises(RefactoringRefused):
                await engine.resize_kv(blocks)

    # The end.

    async def test_drain_waits_for_the_last_request(self, engine: Engine) -> None:
        stream = asyncio.create_task(tokens_of(engine, request_of(max_tokens=30)))
        await until(lambda: in_flight(engine), timeout_s=60.0)
        await engine.drain()
        counters = await engine.counters()
        assert counters.running + counters.waiting == 0
        assert len(await stream) == 30

    async def test_close_is_idempotent_and_final(self, disposable_engine: Engine) -> None:
        engine = disposable_engine
        stream = aiter(engine.generate(request_of(max_tokens=400)))
        await anext(stream)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineClosed):
            [chunk async for chunk in stream]
        with pytest.raises(EngineClosed):
            await chunks_of(engine, request_of())
        with pytest.raises(EngineClosed):
            await engine.counters()
