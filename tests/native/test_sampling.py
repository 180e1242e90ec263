"""Penalties, bans and log-probabilities in the real engine: as transformers has them, alone, crowded and disturbed."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as reference

from engines.errors import InvalidRequest
from engines.native.adapter import NativeEngine
from engines.native.sampling import gumbel_noise
from engines.protocol import GenerationRequest, ScoredToken, TopLogprobs
from tests.native.test_exactness import CROWDED
from tests.support.native import even, llama, moved_under, request, running

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

TOKENS = 24
BOUND = 1e-3  # of log-probabilities, see the noise floor in test_exactness.py
CLEAR = 1e-4  # of logits: what is closer may go either way
BAN = ((44,), (12, 13))
FEW_BLOCKS = {"kv_cache_bytes": 14 * 16 * 8 * 2 * 2 * 16 * 4}  # so that sequences are preempted
PARAMS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"frequency_penalty": 0.8, "presence_penalty": 0.5},
    {"logit_bias": {"77": 4.0, "78": 3.0}, "presence_penalty": 1.5},
    {"allowed_token_ids": list(range(5, 300, 3)), "repetition_penalty": 0.8},
    {"bad_words": ["x"], "frequency_penalty": 0.2},
    {"min_p": 0.05, "repetition_penalty": 1.1},
]


def stream(index: int, *, temperature: float = 0.0) -> GenerationRequest:
    prompt = tuple(5 + (index * 37 + i * 11) % 500 for i in range(20 + 13 * (index % 3)))
    params = PARAMS[index % len(PARAMS)]
    plain = request(prompt, max_tokens=TOKENS, temperature=temperature, seed=100 + index)
    banned = BAN if "bad_words" in params else ()
    sampling = replace(plain.sampling, engine_params=params, bad_words=banned, top_logprobs=3, prompt_logprobs=2)
    return replace(plain, sampling=sampling)


Result = tuple[list[int], list[float], list[TopLogprobs], tuple[ScoredToken, ...]]


async def collect(engine: NativeEngine, wanted: GenerationRequest) -> Result:
    tokens: list[int] = []
    logprobs: list[float] = []
    tops: list[TopLogprobs] = []
    prompt: tuple[ScoredToken, ...] = ()
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        logprobs += chunk.logprobs
        tops += chunk.top_logprobs
        prompt += chunk.prompt_logprobs
    return tokens, logprobs, tops, prompt


def all_streams() -> list[GenerationRequest]:
    return [stream(i, temperature=0.9 * (i % 2)) for i in range(len(PARAMS))] + [
        stream(i + 6, temperature=0.9 * (1 - i % 2)) for i in range(len(PARAMS))
    ]


async def run_all(engine: NativeEngine) -> list[Result]:
    return list(await asyncio.gather(*(collect(engine, each) for each in all_streams())))


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(llama())


def logits_of(token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model()(torch.tensor([token_ids])).logits[0]
    return logits


def processed(row: torch.Tensor, wanted: GenerationRequest, output: list[int]) -> torch.Tensor:
    """Return the logits as transformers' processors leave them; frequency and presence, which it lacks, by formula."""
    params, prompt = wanted.sampling.engine_params, list(wanted.prompt_token_ids)
    row = row.clone()[None]
    if "allowed_token_ids" in params:
        kept = torch.full_like(row, -torch.inf)
        kept[:, params["allowed_token_ids"]] = 0.0
        row += kept
    if wanted.sampling.bad_words:
        words = [list(word) for word in wanted.sampling.bad_words]
        row = reference.NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([1]))(
            torch.tensor([output], dtype=torch.long), row
        )
    if "logit_bias" in params:
        bias = {(int(token),): value for token, value in params["logit_bias"].items()}
        row = reference.SequenceBiasLogitsProcessor(bias)(torch.tensor([prompt]), row)
    if "repetition_penalty" in params:
        row = reference.RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(
            torch.tensor([prompt + output]), row
        )
    for token in set(output):
        penalty = params.get("frequency_penalty", 0.0) * output.count(token) + params.get("presence_penalty", 0.0)
        row[0, token] -= penalty
    return row[0]


def candidates(row: torch.Tensor, wanted: GenerationRequest, position: int) -> torch.Tensor:
    """Return what the choice is the largest of."""
    sampling = wanted.sampling
    if not sampling.temperature:
        return row
    row = row.double()[None] / sampling.temperature
    if "min_p" in sampling.engine_params:
        row = reference.MinPLogitsWarper(sampling.engine_params["min_p"])(torch.tensor([[1]]), row)
    return row[0] + torch.from_numpy(gumbel_noise(seed=sampling.seed, position=position, size=row.shape[-1]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[NativeEngine]:
    async with running(llama(), even(2), **(CROWDED | FEW_BLOCKS)) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(engine: NativeEngine) -> list[Result]:
    return [await collect(engine, each) for each in all_streams()]


def assert_same(result: list[Result], undisturbed: list[Result]) -> None:
    assert [tokens for tokens, *_ in result] == [tokens for tokens, *_ in undisturbed]
    for one, other in zip(result, undisturbed, strict=True):
        assert one[1] == pytest.approx(other[1], abs=BOUND)
        assert [len(top) for top in one[2]] == [3] * TOKENS
        assert [each.token_id for each in one[3]] == [each.token_id for each in other[3]]
        assert [each.logprob for each in one[3]] == pytest.approx([each.logprob for each in other[3]], abs=BOUND)


async def test_every_choice_is_that_of_the_reference(undisturbed: list[Result]) -> None:
    for wanted, (tokens, *_) in zip(all_streams(), undisturbed, strict=True):
        prompt = list(wanted.prompt_token_ids)
        logits = logits_of(prompt + tokens)
        for position, token in enumerate(tokens):
            row = processed(logits[len(prompt) + position - 1], wanted, tokens[:position])
            values = candidates(row, wanted, position)
            assert values[token] > values.max() - CLEAR, (wanted.sampling, position)


async def test_the_parameters_make_a_difference(engine: NativeEngine) -> None:
    """The control: without them other tokens are chosen."""
    for index in range(len(PARAMS) - 1):
        plain = replace(stream(index), sampling=request((5,), max_tokens=TOKENS).sampling)
        assert (await collect(engine, plain))[0] != (await collect(engine, stream(index)))[0], PARAMS[index]


async def test_log_probabilities_are_those_of_the_model(undisturbed: list[Result]) -> None:
    for wanted, (tokens, logprobs, tops, scored) in zip(all_streams(), undisturbed, strict=True):
        prompt = list(wanted.prompt_token_ids)
        expected = logits_of(prompt + tokens).log_softmax(dim=-1)
        of_output = expected[len(prompt) - 1 : -1]
        assert logprobs == pytest.approx(of_output[range(TOKENS), tokens].tolist(), abs=BOUND)
        best = of_output.topk(3)
        assert np.allclose([[value for _, value in top] for top in tops], best.values, atol=BOUND)
        assert [each.token_id for each in scored] == prompt[1:]
        of_prompt = expected[: len(prompt) - 1]
        assert [each.logprob for each in scored] == pytest.approx(
            of_prompt[range(len(prompt) - 1), prompt[1:]].tolist(), abs=BOUND
        )
        assert np.allclose([[value for _, value in each.top] for each in scored], of_prompt.topk(2).values, atol=BOUND)
        for each, row in zip(scored, of_prompt, strict=True):
            clearly_better = int((row > each.logprob + BOUND).sum())
            perhaps_better = int((row > each.logprob - BOUND).sum())
            assert clearly_better + 1 <= each.rank <= perhaps_better + 1


async def test_in_a_crowd_and_preempted_it_is_the_same(engine: NativeEngine, undisturbed: list[Result]) -> None:
    before = (await engine.counters()).preemptions_total
    assert_same(await run_all(engine), undisturbed)
    assert (await engine.counters()).preemptions_total > before


async def test_across_refactorings_it_is_the_same(engine: NativeEngine, undisturbed: list[Result]) -> None:
    targets = [even(stages) for stages in (4, 1, 8, 2)]
    for found in await moved_under(engine, targets, lambda: run_all(engine)):
        assert_same(found, undisturbed)


@pytest.mark.parametrize("victim", [0, 1])
async def test_over_the_loss_of_a_worker_it_is_the_same(
    engine: NativeEngine, undisturbed: list[Result], victim: int
) -> None:
    before = await engine.counters()
    streams = asyncio.create_task(run_all(engine))
    while (await engine.counters()).steps_total < before.steps_total + 30:
        pass  # some in prefill, some decoding
    os.kill((await engine.stages())[victim].pids[0], signal.SIGKILL)
    assert_same(await streams, undisturbed)
    assert (await engine.counters()).worker_restarts_total == before.worker_restarts_total + 1


@pytest.mark.parametrize("already", [1, 17])
async def test_another_engine_goes_on_from_the_tokens(
    engine: NativeEngine, undisturbed: list[Result], already: int
) -> None:
    resumed = [
        replace(each, generated_token_ids=tuple(tokens[:already]))
        for each, (tokens, *_) in zip(all_streams(), undisturbed, strict=True)
    ]
    results = await asyncio.gather(*(collect(engine, each) for each in resumed))
    assert [tokens for tokens, *_ in results] == [tokens[already:] for tokens, *_ in undisturbed]
    assert all(prompt == () for *_, prompt in results)


async def test_min_tokens_hold_the_end_back(engine: NativeEngine) -> None:
    plain = stream(0)
    tokens, *_ = await collect(engine, plain)
    stops = (tokens[3],)
    ended, *_ = await collect(engine, replace(plain, sampling=replace(plain.sampling, stop_token_ids=stops)))
    assert ended == tokens[: tokens.index(stops[0]) + 1]
    params = {**plain.sampling.engine_params, "min_tokens": 12}
    held = replace(plain.sampling, stop_token_ids=stops, engine_params=params)
    later, *_ = await collect(engine, replace(plain, sampling=held))
    assert len(later) > 12
    assert stops[0] not in later[:12]


async def test_min_tokens_hold_the_models_end_back_also_where_it_is_to_be_ignored(engine: NativeEngine) -> None:
    (end,) = engine.capabilities.eos_token_ids
    wanted = request((5, 6), max_tokens=8)
    assert wanted.sampling.ignore_eos
    params = {"logit_bias": {str(end): 100.0}, "min_tokens": 5}
    tokens, *_ = await collect(engine, replace(wanted, sampling=replace(wanted.sampling, engine_params=params)))
    assert end not in tokens[:5]
    assert tokens[5:] == [end] * 3


@pytest.mark.parametrize(("name", "value"), [("logit_bias", {"512": 1.0}), ("allowed_token_ids", [512])])
async def test_tokens_outside_the_vocabulary_are_refused_by_name(engine: NativeEngine, name: str, value: Any) -> None:
    wanted = request((5, 6), max_tokens=3)
    with pytest.raises(InvalidRequest) as caught:
        await collect(engine, replace(wanted, sampling=replace(wanted.sampling, engine_params={name: value})))
    assert caught.value.parameter == name
