"""Logits as requests want them changed: against transformers' processors, and a plain formula of vLLM's order."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as reference

from engines.errors import InvalidRequest
from engines.native.asks import asks_of
from engines.native.batch import Batch, Entry
from engines.native.logits import shaped
from engines.native.messages import Draw
from engines.native.sampling import keep_mask, sample
from engines.native.sequence import Sequence
from engines.native.shaping import Shaping, shaping_of
from engines.native.shared import SharedMemory, SharedSizes
from engines.native.token_mask import allow_all, allow_only, forbid, is_set, words_for
from engines.protocol import SamplingParams

VOCABULARY = 50
PROMPT = [3, 4, 5, 3, 40]
OUTPUT = [7, 3, 7, 7, 9]


def memory() -> SharedMemory:
    return SharedMemory(
        SharedSizes(
            num_workers=1,
            max_num_seqs=4,
            max_blocks_per_seq=1,
            hidden_bytes_per_token=4,
            max_num_batched_tokens=1,
            outbox_slots=1,
            staging_bytes=4,
            max_model_len=64,
            vocab_size=VOCABULARY,
        )
    )


def sequence_of(
    *,
    output: list[int] = OUTPUT,
    bad_words: tuple[tuple[int, ...], ...] = (),
    stop: tuple[int, ...] = (),
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(max_tokens=30, bad_words=bad_words, engine_params=params)
    sequence = Sequence(
        key=1,
        prompt=list(PROMPT),
        generated=list(output),
        sampling=sampling,
        stop_ids=frozenset(stop),
        order=1,
        shaping=shaping_of(sampling, vocab_size=VOCABULARY),
    )
    sequence.row, sequence.computed = 2, len(sequence.tokens) - 1
    return sequence


def row_of(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def changed(row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """Return the row as the stage that samples sees it, by way of the message to it."""
    shared = memory()
    batch = Batch(1, (Entry(sequence, sequence.computed, 1, samples=True),))
    (shape,) = asks_of(batch, [0], shared).shapes
    return shaped(row, shape, shared)


def by_reference(processor: Any, row: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    result: torch.Tensor = processor(torch.tensor([tokens]), row[None].clone())[0]
    return result


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    row = row_of()
    expected = by_reference(reference.RepetitionPenaltyLogitsProcessor(penalty), row, PROMPT + OUTPUT)
    torch.testing.assert_close(changed(row, sequence_of(repetition_penalty=penalty)), expected)


@pytest.mark.parametrize("penalty", [1e-320, 1e-50, 1e-30, 1e6])
def test_no_repetition_penalty_has_the_mask_or_the_order_of_the_others_forgotten(penalty: float) -> None:
    row = row_of()
    row[3], row[40] = 5.0, -5.0
    own = changed(row, sequence_of(allowed_token_ids=[3, 40, 45], repetition_penalty=penalty))
    assert own.isfinite().nonzero().view(-1).tolist() == [3, 40, 45]
    assert own[40] <= 0.0 < own[3]


def test_frequency_and_presence_count_output_tokens_alone() -> None:
    row = row_of(1)
    expected = row.clone()
    for token in set(OUTPUT):
        expected[token] -= 0.7 * OUTPUT.count(token) + 0.4
    own = changed(row, sequence_of(frequency_penalty=0.7, presence_penalty=0.4))
    torch.testing.assert_close(own, expected)
    assert own[40] == row[40]
    nothing_said = changed(row, sequence_of(output=[], frequency_penalty=0.7))
    assert torch.equal(nothing_said, row)


def test_logit_bias_is_that_of_transformers() -> None:
    row = row_of(2)
    expected = by_reference(reference.SequenceBiasLogitsProcessor({(5,): 2.0, (9,): -100.0}), row, PROMPT + OUTPUT)
    torch.testing.assert_close(changed(row, sequence_of(logit_bias={"5": 2.0, "9": -100.0})), expected)


@pytest.mark.parametrize("words", [((9,),), ((9, 11),), ((7, 9, 11), (8, 12)), ((3, 4),)])
def test_bad_words_are_those_of_transformers(words: tuple[tuple[int, ...], ...]) -> None:
    row = row_of(3)
    processor = reference.NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=torch.tensor([1]))
    expected = by_reference(processor, row, OUTPUT)
    torch.testing.assert_close(changed(row, sequence_of(bad_words=words)), expected)


@pytest.mark.parametrize("min_tokens", [4, 5, 6])
def test_min_tokens_are_those_of_transformers(min_tokens: int) -> None:
    row = row_of(4)
    processor = reference.MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, torch.tensor([1, 8]), device="cpu")
    expected = by_reference(processor, row, PROMPT + OUTPUT)
    torch.testing.assert_close(changed(row, sequence_of(min_tokens=min_tokens, stop=(1, 8))), expected)


def test_only_what_is_allowed_can_be_chosen() -> None:
    row = row_of(5)
    own = changed(row, sequence_of(allowed_token_ids=[4, 49, 0]))
    assert own.isfinite().nonzero().view(-1).tolist() == [0, 4, 49]
    assert torch.equal(own[[0, 4, 49]], row[[0, 4, 49]])


def test_of_two_rules_that_leave_nothing_the_mask_counts() -> None:
    own = changed(row_of(6), sequence_of(allowed_token_ids=[8], bad_words=((8,),)))
    assert own.argmax() == 8


def test_all_at_once_act_in_vllms_order() -> None:
    """Mask, bad words, bias, repetition, frequency, presence: a bias is penalised, too."""
    row = row_of(7)
    sequence = sequence_of(
        allowed_token_ids=list(range(30)),
        bad_words=((9, 11),),
        logit_bias={"7": 5.0, "3": -1.0},
        repetition_penalty=1.5,
        frequency_penalty=0.3,
        presence_penalty=-0.2,
    )
    expected = [-np.inf] * VOCABULARY
    for token in set(range(30)) - {11}:
        value = float(row[token]) + {7: 5.0, 3: -1.0}.get(token, 0.0)
        if token in PROMPT + OUTPUT:
            value = value / 1.5 if value > 0 else value * 1.5
        if token in OUTPUT:
            value -= 0.3 * OUTPUT.count(token) - 0.2
        expected[token] = value
    torch.testing.assert_close(changed(row, sequence), torch.tensor(expected))


@pytest.mark.parametrize("seed", range(20))
def test_min_p_is_that_of_transformers(seed: int) -> None:
    min_p = random.Random(seed).choice([0.01, 0.1, 0.5, 1.0])
    row, temperature = row_of(seed), 1.4
    scaled = row / temperature
    kept = by_reference(reference.MinPLogitsWarper(min_p), scaled, PROMPT).isfinite()
    draws = [
        Draw(row=i, temperature=temperature, top_p=1.0, top_k=0, seed=5, position=i, min_p=min_p) for i in range(200)
    ]
    drawn = set(sample(row.expand(200, -1), draws).tolist())
    assert drawn <= set(kept.nonzero().view(-1).tolist())
    if int(kept.sum()) < 4:
        assert len(drawn) == int(kept.sum())


def test_top_p_is_cut_from_what_min_p_leaves() -> None:
    row = torch.tensor([3.0, 2.9, 2.8] + [0.0] * 47)
    left = row.double().masked_fill(row < 3.0 + np.log(0.5), -torch.inf)
    kept = keep_mask(left, top_k=0, top_p=0.6) & left.isfinite()
    assert kept.nonzero().view(-1).tolist() == [0, 1]
    draws = [Draw(row=i, temperature=1.0, top_p=0.6, top_k=0, seed=1, position=i, min_p=0.5) for i in range(200)]
    assert set(sample(row.expand(200, -1), draws).tolist()) == {0, 1}


def test_rows_that_ask_for_nothing_are_as_they_were() -> None:
    logits = torch.stack([row_of(seed) for seed in range(4)])
    own = changed(logits[2], sequence_of(logit_bias={str(int(logits[2].argmin())): 100.0}))
    tokens = sample(logits, [], {2: own})
    assert tokens.tolist() == [*logits[:2].argmax(dim=-1).tolist(), int(logits[2].argmin()), int(logits[3].argmax())]


def test_tokens_are_copied_to_shared_memory_once_and_again_after_a_preemption() -> None:
    sequence, shared = sequence_of(presence_penalty=1.0), memory()

    def dispatch() -> None:
        asks_of(Batch(1, (Entry(sequence, sequence.computed, 1, samples=True),)), [0], shared)

    dispatch()
    assert shared.tokens[2, : len(sequence.tokens)].tolist() == PROMPT + OUTPUT
    sequence.tokens.append(11)
    shared.tokens[2, 0] = 99  # written before: not touched again
    dispatch()
    assert shared.tokens[2, :11].tolist() == [99, *PROMPT[1:], *OUTPUT, 11]
    sequence.row, sequence.mirrored = 1, 0
    dispatch()
    assert shared.tokens[1, :11].tolist() == [*PROMPT, *OUTPUT, 11]


def test_a_plain_greedy_request_costs_the_stage_nothing() -> None:
    plain = sequence_of()
    assert plain.shaping is None
    asks = asks_of(Batch(1, (Entry(plain, plain.computed, 1, samples=True),)), [0], memory())
    assert (asks.draws, asks.shapes, asks.tops, asks.scored, asks.logprobs) == ([], [], [], [], False)
    only_min_p = sequence_of(min_p=0.1)
    asks = asks_of(Batch(1, (Entry(only_min_p, plain.computed, 1, samples=True),)), [0], memory())
    assert (asks.draws, asks.shapes) == ([], [])


def test_a_request_that_asks_for_nothing_has_no_shaping() -> None:
    assert shaping_of(SamplingParams(max_tokens=3, temperature=1.0), vocab_size=VOCABULARY) is None
    assert not Shaping(min_p=0.5).counts_tokens


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"logit_bias": {"50": 1.0}}, "logit_bias"),
        ({"allowed_token_ids": [50]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
    ],
)
def test_tokens_outside_the_vocabulary_are_refused_by_name(params: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        shaping_of(SamplingParams(max_tokens=3, engine_params=params), vocab_size=VOCABULARY)
    assert caught.value.parameter == name


@pytest.mark.parametrize("size", [1, 31, 32, 33, 512])
def test_masks_hold_what_was_put_in(size: int) -> None:
    words = np.full(words_for(size), -1, dtype=np.int32)
    wanted = tuple(range(0, size, 3))
    allow_only(words, wanted)
    assert np.flatnonzero(is_set(words, size)).tolist() == list(wanted)
    allow_all(words, size)
    forbid(words, [*range(0, size, 2), size + 10_000])
    assert np.flatnonzero(is_set(words, size)).tolist() == (list(range(1, size, 2)) if size > 1 else [0])
