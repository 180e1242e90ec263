"""Paged attention with torch's operations, for any dtype and device: all that decodes together, prompts one by one.

Sequences that decode attend in groups of similar length, so that a step is a few calls for each layer, however many
they are; a shorter one reads its newest token again in place of what it lacks, and does not attend to that. What is the
same for all layers (slots, masks) is made once for a step and each window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engines.native.paged_step import PagedStep, Scores

_PADDED, _SPARE_TOKENS = 1.5, 1024  # a group may read so many times what its sequences have, and a bit more
_AT_ONCE_TOKENS = 16_384  # the keys and values of so many are copied at a time
_MULTIPLE = 8  # of keys: attention masks of CUDA kernels are laid out so

_Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences that attend together, with as many new tokens each.

    ``tokens``: where in the step, (sequences, new); ``slots``: what they read, (sequences * keys); ``mask``: which of
    it counts, (sequences, 1, new, keys).
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor


class TorchStep:
    """A step as torch's operations need it, on the device of the KV cache."""

    def __init__(self, step: PagedStep, device: torch.device) -> None:
        self._step = step
        self._device = device
        self._by_window: dict[int | None, list[_Group]] = {}
        self.written = self._put(_slots(step, step.rows[step.sequence_of], step.positions.astype(np.int64)))

    def groups(self, window_tokens: int | None) -> list[_Group]:
        """Return the groups for layers that attend to so many tokens."""
        found = self._by_window.get(window_tokens)
        if found is None:
            found = self._by_window[window_tokens] = self._made(window_tokens)
        return found

    def _made(self, window_tokens: int | None) -> list[_Group]:
        starts, counts = self._step.starts.astype(np.int64), self._step.counts.astype(np.int64)
        first = np.zeros_like(starts) if window_tokens is None else np.maximum(0, starts - window_tokens + 1)
        keys = starts + counts - first
        decoding, prompts = np.flatnonzero(counts == 1), np.flatnonzero(counts != 1)
        together = [decoding[each] for each in alike(keys[decoding].tolist())]
        members = [*together, *([index] for index in prompts.tolist())]
        return [self._group(np.asarray(each), first, keys, window_tokens) for each in members]

    def _group(self, members: _Slots, first: _Slots, keys: _Slots, window_tokens: int | None) -> _Group:
        step = self._step
        new, most = int(step.counts[members[0]]), -(-int(keys[members].max()) // _MULTIPLE) * _MULTIPLE
        at = step.starts[members].astype(np.int64)[:, None] + np.arange(new)
        read = first[members][:, None] + np.arange(most)
        mask = read[:, None, :] <= at[:, :, None]
        if window_tokens is not None:
            mask &= read[:, None, :] > at[:, :, None] - window_tokens
        read = np.minimum(read, at[:, -1:])
        tokens = (step.ends[members].astype(np.int64) - new)[:, None] + np.arange(new)
        return _Group(
            tokens=self._put(tokens),
            slots=self._put(_slots(step, step.rows[members][:, None], read).reshape(-1)),
            mask=self._put(mask[:, None]),
        )

    def _put(self, values: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Return the indices of sequences in groups of similar length, longest first, each of a bounded size."""
    groups: list[list[int]] = []
    own = 0
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        padded = lengths[groups[-1][0]] * (len(groups[-1]) + 1) if groups else 0
        own += lengths[index]
        if groups and padded <= min(_AT_ONCE_TOKENS, _PADDED * own + _SPARE_TOKENS):
            groups[-1].append(index)
        else:
            groups.append([index])
            own = lengths[index]
    return groups


def torch_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, layer: int, step: PagedStep
) -> torch.Tensor:
    """Attend; q, k, v of shape (1, heads, tokens, head_dim); the result is (1, tokens, heads, head_dim)."""
    keys, values = step.kv.keys[layer], step.kv.values[layer]
    if step.torch is None:
        step.torch = TorchStep(step, keys.device)
    keys.index_copy_(0, step.torch.written, k[0].transpose(0, 1))
    values.index_copy_(0, step.torch.written, v[0].transpose(0, 1))
    asked = q[0].transpose(0, 1)
    out = torch.empty(asked.shape, dtype=q.dtype, device=q.device)
    for group in step.torch.groups(scores.window_tokens):
        out[group.tokens] = _attend(asked[group.tokens], _read(keys, group), _read(values, group), group.mask, scores)
    return out[None]


def _read(cache: torch.Tensor, group: _Group) -> torch.Tensor:
    """Return the keys or values of a group: (sequences, kv_heads, keys, head_dim)."""
    found = cache.index_select(0, group.slots).view(len(group.tokens), -1, *cache.shape[1:])
    return found.transpose(1, 2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attend; q: (sequences, new, heads, head_dim), k and v: (sequences, kv_heads, keys, head_dim)."""
    sequences, new, heads, head_dim = q.shape
    q = q.transpose(1, 2)
    if new == 1:  # heads that share keys and values are taken for as many new tokens: nothing is copied
        q = q.reshape(sequences, k.shape[1], -1, head_dim)
    else:
        k, v = (each.repeat_interleave(heads // k.shape[1], 1) for each in (k, v))
    if scores.softcap is None:
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)
    else:
        capped = scores.softcap * torch.tanh(q @ k.transpose(-1, -2) * scores.scale / scores.softcap)
        weights = capped.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
        found = weights.to(q.dtype) @ v
    return found.reshape(sequences, heads, new, head_dim).transpose(1, 2)


def _slots(step: PagedStep, rows: npt.NDArray[np.int32], positions: _Slots) -> _Slots:
    size = step.kv_block_tokens
    return step.table[rows, positions // size].astype(np.int64) * size + positions % size
