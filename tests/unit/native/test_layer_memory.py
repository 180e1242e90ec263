"""Parameters in memory that processes share."""

import os

import pytest
import torch

from engines.native.layer_memory import fill, mapped


def test_tensors_come_out_as_the_type_that_is_asked_for_and_outlive_the_descriptor() -> None:
    given = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b.c": torch.tensor(7.0), "empty": torch.zeros(0)}
    descriptor = fill("0", given, dtype=torch.float32)
    found = mapped(descriptor)
    os.close(descriptor)
    assert list(found) == list(given)
    for name, tensor in given.items():
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], tensor.float())
        assert found[name].data_ptr() % 64 == 0


def test_nobody_changes_it_for_others() -> None:
    descriptor = fill("0", {"a": torch.zeros(4)}, dtype=torch.float32)
    mine, others = mapped(descriptor)["a"], mapped(descriptor)["a"]
    mine.fill_(1.0)
    assert others.tolist() == [0.0] * 4
    with pytest.raises(PermissionError):
        os.pwrite(descriptor, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(descriptor, 1)
    os.close(descriptor)
