"""Where a worker computes: on the CPU, in the host's memory, or on an accelerator that has memory of its own.

There, weights are copied instead of mapped, a KV cache is allocated instead of backed page by page, and what comes from
the core or from another worker is brought over at the beginning of a step. Not yet run on a GPU; the same path runs in
the host's memory in tests.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from engines.native.device_copy import copied
from topology.cuda_order import visible_environment

IN_PLACE: Final = ""  # on the CPU, in the host's memory
STAND_IN: Final = "stand-in"  # as on an accelerator, but on the CPU: for tests
_HOST: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """``device`` is torch's; ``own_memory`` says that it is not the host's, or is to be treated as if it were not."""

    device: torch.device = _HOST
    own_memory: bool = False

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return parameters where they are computed with; mapped ones as they are on the CPU. Blocks for a copy.

        May run in a thread beside the steps: on a GPU it has a stream of its own.
        """
        if not self.own_memory:
            return dict(tensors)
        if self.device.type != "cuda":
            return copied(tensors, self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            copies = copied(tensors, self.device)
        stream.synchronize()  # the steps' stream may read them from here on
        return copies

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the host's on the device."""
        return tensor.to(self.device)

    def pin(self, memory: memoryview) -> None:
        """Have a GPU copy from and to this memory of the host's directly. Without that it is as exact, only slower.

        The memory is shared, so that all workers of a host pin the same pages, each for its own GPU.
        """
        if self.device.type == "cuda":
            start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            torch.cuda.cudart().cudaHostRegister(start, memory.nbytes, 0)  # type: ignore[no-untyped-call]

    def give_back(self) -> None:
        """Let others have the device's memory that torch keeps for later."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def open_compute(visible: str) -> Compute:
    """Return where this process computes: ``IN_PLACE``, ``STAND_IN``, or a GPU or MIG instance by UUID.

    A process must ask before anything in it has used CUDA, and only once: it sees no other GPU from then on. The parent
    may not have used CUDA at all, for that does not survive a fork.
    """
    if visible == IN_PLACE:
        return Compute()
    if visible == STAND_IN:
        return Compute(own_memory=True)
    os.environ.update(visible_environment([visible]))
    return Compute(device=torch.device("cuda", 0), own_memory=True)
