"""Parameters are copied to a device through two buffers, whatever their sizes and kinds are."""

import pytest
import torch

from engines.native.device_copy import copied


@pytest.mark.parametrize("buffer_bytes", [1, 24, 1000, 1 << 20])  # of every number of turns, and none
def test_copies_are_equal_and_share_nothing(buffer_bytes: int) -> None:
    draw = torch.Generator().manual_seed(7)
    tensors = {
        "matrix": torch.randn(17, 5, generator=draw).to(torch.bfloat16),
        "turned": torch.randn(6, 4, generator=draw).t(),
        "vector": torch.arange(9),
        "one": torch.tensor(2.5),
        "nothing": torch.empty(0, 3),
    }
    found = copied(tensors, torch.device("cpu"), buffer_bytes=buffer_bytes)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype is tensor.dtype
        assert not tensor.numel() or found[name].data_ptr() != tensor.data_ptr()


def test_of_no_tensors_there_are_no_copies() -> None:
    assert copied({}, torch.device("cpu")) == {}
