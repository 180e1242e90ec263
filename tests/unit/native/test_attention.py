"""Paged attention: the compiled kernel and the torch path against plain attention over whole sequences."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engines.native.attention import ATTENTION_NAME, CompiledAttention, register
from engines.native.kv_memory import KVMemory
from engines.native.linear import LinearOps
from engines.native.paged_step import PagedStep, Scores
from engines.native.torch_attention import alike, torch_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scores, int, PagedStep], torch.Tensor]
MAX_CONTEXT = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    num_kv_heads: int = 2
    group: int = 2
    head_dim: int = 32
    block_tokens: int = 16
    window_tokens: int | None = None
    softcap: float | None = None

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def scores(self) -> Scores:
        return Scores(scale=self.head_dim**-0.5, window_tokens=self.window_tokens, softcap=self.softcap)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Queries, keys and values of one sequence, of shape (heads, tokens, head_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    def part(self, start: int, count: int) -> Tokens:
        return Tokens(*(t[:, start : start + count] for t in (self.q, self.k, self.v)))


def random_tokens(shape: Shape, length: int, *, seed: int, dtype: torch.dtype = torch.float32) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return Tokens(*(torch.randn(heads, length, shape.head_dim, generator=generator).to(dtype) for heads in sizes))


class Cache:
    """A KV cache with room for some rows, whose KV blocks lie scattered, and the attention under test."""

    def __init__(
        self, attention: Attention, shape: Shape, *, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        per_row = MAX_CONTEXT // shape.block_tokens
        self.shape = shape
        self.kv = KVMemory(
            num_decoders=2,
            num_slots=(rows * per_row + 1) * shape.block_tokens,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
        )
        ids = list(range(1, rows * per_row + 1))
        random.Random(seed).shuffle(ids)
        self.table = np.array(ids, dtype=np.int32).reshape(rows, per_row)
        self._attention = attention

    def step(self, entries: list[tuple[int, int, Tokens]], *, layer: int = 1) -> list[torch.Tensor]:
        """Run one micro-batch of (row, start, new tokens); return each entry's result (tokens, heads, head_dim)."""
        step = PagedStep(
            table=self.table,
            rows=np.array([row for row, _, _ in entries], dtype=np.int32),
            starts=np.array([start for _, start, _ in entries], dtype=np.int32),
            counts=np.array([tokens.q.shape[1] for _, _, tokens in entries], dtype=np.int32),
            kv_block_tokens=self.shape.block_tokens,
            kv=self.kv,
        )
        # Tokens before heads in memory, as the projections of a model leave them.
        q, k, v = (
            torch.cat([getattr(tokens, name).transpose(0, 1) for _, _, tokens in entries]).transpose(0, 1)[None]
            for name in "qkv"
        )
        out = self._attention(q, k, v, self.shape.scores, layer, step)
        return list(torch.split(out[0], step.counts.tolist()))


def plain_attention(tokens: Tokens, how: Scores) -> torch.Tensor:
    """Return causal attention over a whole sequence, in float64: (tokens, heads, head_dim)."""
    group = tokens.q.shape[0] // tokens.k.shape[0]
    q, k, v = tokens.q.double(), tokens.k.double(), tokens.v.double()
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    if how.window_tokens is not None:
        hidden |= torch.ones(scores.shape[1:], dtype=torch.bool).tril(-how.window_tokens)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)


@pytest.fixture(params=["compiled", "torch"])
def attention(request: pytest.FixtureRequest, kernel: Path) -> Attention:
    return CompiledAttention(kernel) if request.param == "compiled" else torch_attention


@pytest.fixture
def compiled(kernel: Path) -> Attention:
    return CompiledAttention(kernel)


def ragged_run(cache: Cache, sequences: list[Tokens], rng: random.Random) -> list[torch.Tensor]:
    """Take all sequences to their ends in micro-batches of random chunks: prefills beside decodes."""
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    while unfinished := [i for i, tokens in enumerate(sequences) if done[i] < tokens.q.shape[1]]:
        chosen = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        counts = [min(rng.choice([1, 1, 5, 16, 30]), sequences[i].q.shape[1] - done[i]) for i in chosen]
        entries = [(i, done[i], sequences[i].part(done[i], n)) for i, n in zip(chosen, counts, strict=True)]
        for i, count, out in zip(chosen, counts, cache.step(entries), strict=True):
            parts[i].append(out)
            done[i] += count
    return [torch.cat(part) for part in parts]


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_ragged_batches_equal_plain_attention(
    attention: Attention, group: int, head_dim: int, block_tokens: int
) -> None:
    shape = Shape(group=group, head_dim=head_dim, block_tokens=block_tokens)
    rng = random.Random(group * head_dim + block_tokens)
    sequences = [random_tokens(shape, rng.randint(1, MAX_CONTEXT), seed=i) for i in range(4)]
    results = ragged_run(Cache(attention, shape, rows=4), sequences, rng)
    for tokens, result in zip(sequences, results, strict=True):
        torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window_tokens", [1, 7, 16, 33, 500])
def test_windows_and_soft_caps(
    attention: Attention, window_tokens: int, softcap: float | None, block_tokens: int
) -> None:
    shape = Shape(window_tokens=window_tokens, softcap=softcap, block_tokens=block_tokens)
    rng = random.Random(window_tokens + block_tokens)
    sequences = [random_tokens(shape, rng.randint(1, MAX_CONTEXT), seed=i) for i in range(4)]
    results = ragged_run(Cache(attention, shape, rows=4), sequences, rng)
    for tokens, result in zip(sequences, results, strict=True):
        torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=1e-4, atol=1e-5)


def test_what_a_window_has_left_behind_is_not_read(attention: Attention) -> None:
    """Not even as zero times something: a KV block may hold anything there."""
    shape = Shape(window_tokens=20)
    tokens = random_tokens(shape, 80, seed=1)
    cache = Cache(attention, shape, rows=1)
    cache.step([(0, 0, tokens.part(0, 79))])
    for block in cache.table[0, :3]:  # positions 0 to 47; the window of position 79 begins at 60
        cache.kv.values[1][block * 16 : block * 16 + 16] = torch.nan
    (result,) = cache.step([(0, 79, tokens.part(79, 1))])
    expected = plain_attention(tokens, shape.scores)[79:]
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_what_was_never_written_is_not_read(attention: Attention) -> None:
    """Memory of a device is as somebody left it, and sequences that attend together have different lengths."""
    shape = Shape(group=2)
    cache = Cache(attention, shape, rows=4)
    cache.kv.keys[1][:] = torch.nan
    cache.kv.values[1][:] = torch.nan
    sequences = [random_tokens(shape, length, seed=length) for length in (2, 17, 40, 90)]
    cache.step([(row, 0, tokens.part(0, tokens.q.shape[1] - 1)) for row, tokens in enumerate(sequences)])
    results = cache.step(
        [
            (row, n - 1, tokens.part(n - 1, 1))
            for row, (n, tokens) in enumerate((tokens.q.shape[1], tokens) for tokens in sequences)
        ]
    )
    for tokens, result in zip(sequences, results, strict=True):
        expected = plain_attention(tokens, shape.scores)[-1:]
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_head_dims_of_other_models(attention: Attention, head_dim: int) -> None:
    shape = Shape(head_dim=head_dim, group=3)
    tokens = random_tokens(shape, 40, seed=head_dim)
    (result,) = Cache(attention, shape, rows=1).step([(0, 0, tokens)])
    torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=1e-4, atol=1e-5)


def test_large_scores_do_not_overflow(attention: Attention) -> None:
    shape = Shape()
    tokens = random_tokens(shape, 50, seed=1)
    tokens = Tokens(tokens.q * 60, tokens.k * 60, tokens.v)
    (result,) = Cache(attention, shape, rows=1).step([(0, 0, tokens)])
    torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=1e-3, atol=1e-3)


def test_keys_and_values_go_to_their_slots_of_their_layer(attention: Attention) -> None:
    shape = Shape()
    cache = Cache(attention, shape, rows=2)
    tokens = random_tokens(shape, 20, seed=1)
    cache.step([(1, 0, tokens)], layer=0)
    slots = [int(cache.table[1, p // 16]) * 16 + p % 16 for p in range(20)]
    assert torch.equal(cache.kv.keys[0][slots], tokens.k.transpose(0, 1))
    assert torch.equal(cache.kv.values[0][slots], tokens.v.transpose(0, 1))
    written = cache.kv.keys[0].ne(0).flatten(1).any(dim=1).nonzero().view(-1)
    assert sorted(slots) == written.tolist()
    assert cache.kv.mapped_bytes(1) == 0


def test_kernel_and_torch_agree(compiled: Attention) -> None:
    shape = Shape(group=4, head_dim=64)
    sequences = [random_tokens(shape, length, seed=length) for length in (1, 17, 64, 90)]
    ours, theirs = (
        ragged_run(Cache(attention, shape, rows=4), sequences, random.Random(5))
        for attention in (compiled, torch_attention)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_the_kernel_gives_the_same_bits_alone_and_in_any_batch_and_chunks(compiled: Attention, seed: int) -> None:
    rng = random.Random(seed)
    window, softcap = rng.choice([None, 5, 30]), rng.choice([None, 3.0])
    shape = Shape(
        group=rng.choice([1, 2, 3, 4, 7]), head_dim=rng.choice([32, 64, 80, 96]), window_tokens=window, softcap=softcap
    )
    sequences = [random_tokens(shape, rng.randint(1, MAX_CONTEXT), seed=100 * seed + i) for i in range(5)]
    batched = ragged_run(Cache(compiled, shape, rows=5, seed=seed), sequences, rng)
    for tokens, result in zip(sequences, batched, strict=True):
        (alone,) = Cache(compiled, shape, rows=1).step([(0, 0, tokens)])
        assert torch.equal(result, alone)


@pytest.mark.parametrize("window_tokens", [None, 21])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [(4, 64), (8, 64), (2, 128), (8, 32), (1, 256), (16, 16), (3, 64), (4, 80)]
)
def test_many_sequences_that_decode_get_the_bits_of_prompts(
    compiled: Attention, heads: int, head_dim: int, window_tokens: int | None
) -> None:
    """There, heads attend together where they fill the processor's registers, and with less than all of them else."""
    shape = Shape(num_kv_heads=heads, group=1, head_dim=head_dim, window_tokens=window_tokens)
    sequences = [random_tokens(shape, 2 + 11 * i, seed=i) for i in range(9)]
    cache = Cache(compiled, shape, rows=9)
    cache.step([(i, 0, tokens.part(0, 1 + 11 * i)) for i, tokens in enumerate(sequences)])
    together = cache.step([(i, 1 + 11 * i, tokens.part(1 + 11 * i, 1)) for i, tokens in enumerate(sequences)])
    for tokens, result in zip(sequences, together, strict=True):
        (alone,) = Cache(compiled, shape, rows=1).step([(0, 0, tokens)])
        assert torch.equal(result, alone[-1:])
        expected = plain_attention(tokens, shape.scores)[-1:]
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_gives_the_same_bits_for_every_size_of_kv_block(compiled: Attention) -> None:
    small, large = Shape(block_tokens=16), Shape(block_tokens=48)
    tokens = random_tokens(small, 77, seed=3)
    assert torch.equal(
        Cache(compiled, small, rows=1).step([(0, 0, tokens)])[0],
        Cache(compiled, large, rows=1).step([(0, 0, tokens)])[0],
    )


def test_the_kernel_gives_the_same_bits_with_more_threads(compiled: Attention, kernel: Path) -> None:
    shape = Shape(group=4, head_dim=64)
    tokens = random_tokens(shape, 90, seed=3)
    one = Cache(compiled, shape, rows=1).step([(0, 0, tokens)])[0]
    ops = LinearOps(kernel)
    ops.set_threads(2)
    try:
        two = Cache(compiled, shape, rows=1).step([(0, 0, tokens)])[0]
    finally:
        ops.set_threads(1)
    assert torch.equal(one, two)


class Layer(torch.nn.Module):
    """What transformers hands to an attention function as its module."""

    layer_idx = 1


def registered(library: Path | None, shape: Shape) -> Attention:
    """Return the attention function as a model calls it."""
    function = ALL_ATTENTION_FUNCTIONS[register(library)]

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, layer: int, step: PagedStep
    ) -> torch.Tensor:
        assert layer == Layer.layer_idx
        passed = {"scaling": scores.scale, "sliding_window": scores.window_tokens, "softcap": scores.softcap}
        out, weights = function(Layer(), q, k, v, None, **passed, step=step, dropout=0.0, is_causal=True)
        assert weights is None
        return out  # type: ignore[no-any-return]

    assert shape.num_heads
    return attend


def result_of(attention: Attention, shape: Shape, tokens: Tokens, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    (result,) = Cache(attention, shape, rows=1, dtype=dtype).step([(0, 0, tokens)])
    return result


@pytest.mark.parametrize("shape", [Shape(head_dim=64), Shape(window_tokens=9, softcap=2.0)], ids=["plain", "gemma"])
def test_a_model_gets_the_kernel_in_float32(kernel: Path, compiled: Attention, shape: Shape) -> None:
    tokens = random_tokens(shape, 60, seed=2)
    assert torch.equal(result_of(registered(kernel, shape), shape, tokens), result_of(compiled, shape, tokens))
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS


def test_without_a_kernel_a_model_gets_torch() -> None:
    shape = Shape(head_dim=64)
    tokens = random_tokens(shape, 60, seed=2)
    assert torch.equal(result_of(registered(None, shape), shape, tokens), result_of(torch_attention, shape, tokens))


@pytest.mark.parametrize("shape", [Shape(head_dim=64), Shape(window_tokens=9, softcap=2.0)], ids=["plain", "gemma"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_through_torch(kernel: Path, dtype: torch.dtype, shape: Shape) -> None:
    tokens = random_tokens(shape, 60, seed=2, dtype=dtype)
    result = result_of(registered(kernel, shape), shape, tokens, dtype)
    assert result.dtype is dtype
    torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "shape",
    [Shape(head_dim=320), Shape(block_tokens=8), Shape(block_tokens=24), Shape(num_kv_heads=1, group=17)],
    ids=["head-dim", "small-kv-blocks", "odd-kv-blocks", "group"],
)
def test_what_the_kernel_does_not_support_goes_through_torch(kernel: Path, shape: Shape) -> None:
    tokens = random_tokens(shape, 60, seed=2)
    result = result_of(registered(kernel, shape), shape, tokens)
    torch.testing.assert_close(result.double(), plain_attention(tokens, shape.scores), rtol=1e-4, atol=1e-5)


def test_the_kernel_alone_refuses_what_it_does_not_support(compiled: Attention) -> None:
    shape = Shape(head_dim=320)
    with pytest.raises(ValueError, match="does not support head_dim 320"):
        result_of(compiled, shape, random_tokens(shape, 3, seed=0))


def test_the_kernel_refuses_rows_that_are_not_contiguous(compiled: Attention) -> None:
    shape = Shape()
    tokens = random_tokens(shape, 32, seed=0)
    cache = Cache(lambda q, *rest: compiled(q.transpose(2, 3).contiguous().transpose(2, 3), *rest), shape, rows=1)
    with pytest.raises(ValueError, match="must be contiguous"):
        cache.step([(0, 0, tokens)])


def test_sequences_of_similar_length_attend_together() -> None:
    assert alike([]) == []
    assert alike([40, 30, 50]) == [[2, 0, 1]]
    short = [30] * 200
    assert alike([9000, *short]) == [[0], list(range(1, 201))]  # else they would read 1.8 million tokens
    assert [len(each) for each in alike([1000] * 40)] == [16, 16, 8]  # bounded in memory
    assert alike([100_000]) == [[0]]


@given(st.lists(st.integers(1, 5000), max_size=60))
def test_groups_hold_each_sequence_once_and_read_little_in_vain(lengths: list[int]) -> None:
    groups = alike(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[index] for index in group]
        assert len(group) == 1 or max(own) * len(own) <= min(16_384, 1.5 * sum(own) + 1024)
