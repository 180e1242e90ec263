"""Parameters come to a GPU through pinned memory. Written without one at hand: this has not run yet."""

import pytest
import torch

from engines.native.compute import Compute
from engines.native.device_copy import copied
from engines.native.shared import SharedMemory, SharedSizes

pytestmark = [pytest.mark.engine, pytest.mark.gpu]


def test_copies_on_a_gpu_are_equal_however_often_the_buffers_are_used() -> None:
    if not torch.cuda.is_available():
        pytest.skip("a CUDA device is needed, there is none")
    device = torch.device("cuda", 0)
    tensors = {"large": torch.randn(1024, 4099), "small": torch.randn(3).to(torch.bfloat16)}
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        found = copied(tensors, device, buffer_bytes=1 << 20)
    stream.synchronize()
    assert all(each.device == device for each in found.values())
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in tensors.items())


def test_what_workers_share_is_pinned() -> None:
    if not torch.cuda.is_available():
        pytest.skip("a CUDA device is needed, there is none")
    compute = Compute(device=torch.device("cuda", 0), own_memory=True)
    shared = SharedMemory(
        SharedSizes(
            num_workers=2,
            max_num_seqs=1,
            max_blocks_per_seq=1,
            hidden_bytes_per_token=4096,
            max_num_batched_tokens=16,
            outbox_slots=3,
            staging_bytes=1 << 20,
        )
    )
    for area in shared.areas:
        compute.pin(area)
    assert torch.frombuffer(shared.staging(1, 2), dtype=torch.uint8).is_pinned()
    assert torch.frombuffer(shared.outbox(1, 2), dtype=torch.uint8).is_pinned()
