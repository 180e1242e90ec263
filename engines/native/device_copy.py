"""Copies parameters from the host's memory to a device, through pinned buffers: one is filled while the other is sent.

From memory that is not pinned a driver copies through a small buffer of its own, and whoever asked waits. To pin
parameters where they lie would copy them: they are mapped privately, and a lasting pin makes such pages one's own.
Not yet run on a GPU; the same path runs in the host's memory in tests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Final

import torch

_BUFFER_BYTES: Final = 32 << 20  # a transfer of so much takes a millisecond, beside which it costs nothing to begin one


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """``sent``: after what was sent last from here; None: nothing was, or sending waits by itself."""

    memory: torch.Tensor
    sent: torch.cuda.Event | None = None


def copied(
    tensors: Mapping[str, torch.Tensor], device: torch.device, *, buffer_bytes: int = _BUFFER_BYTES
) -> dict[str, torch.Tensor]:
    """Return copies of ``tensors`` on ``device``. On a GPU they are complete when its current stream is."""
    is_cuda = device.type == "cuda"
    size = min(buffer_bytes, max((each.nbytes for each in tensors.values()), default=0))
    # torch keeps pinned memory that was used, and gives it again.
    buffers = [_Buffer(memory=torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)) for _ in range(2)]
    turn, found = count(), {}
    for name, tensor in tensors.items():
        copy = found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if not tensor.nbytes:
            continue
        source, target = _bytes_of(tensor.contiguous()), _bytes_of(copy)
        for start in range(0, tensor.nbytes, size):
            _send(buffers[next(turn) % 2], source[start : start + size], target[start : start + size])
    return found


def _send(buffer: _Buffer, source: torch.Tensor, target: torch.Tensor) -> None:
    if buffer.sent is not None:
        buffer.sent.synchronize()
    memory = buffer.memory[: len(source)]
    memory.copy_(source)
    target.copy_(memory, non_blocking=True)
    if target.is_cuda:
        buffer.sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        buffer.sent.record()


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
