"""Matrix products of the kernels: against float64, for each type that checkpoints have, bit for bit in any batch."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import nn

from engines.native.linear import LinearOps, install, struct_of

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def ops(kernel: Path) -> LinearOps:
    return LinearOps(kernel)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def module_of(outputs: int, inputs: int, *, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    module = nn.Linear(inputs, outputs, bias=bias).requires_grad_(requires_grad=False)
    module.weight.data = module.weight.data.to(dtype)
    return module


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(1, 7, 40), (13, 33, 1500), (200, 64, 256), (6, 4, 3), (45, 83, 1500)]
)
def test_products_are_exact_to_float32(
    ops: LinearOps, tokens: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    if not ops.reads(dtype):
        pytest.skip("this processor does not read float16")
    module = module_of(outputs, inputs, dtype=dtype, bias=bias)
    hidden = torch.randn(1, tokens, inputs)
    own = None if module.bias is None else module.bias.double()
    expected = nn.functional.linear(hidden.double(), module.weight.double(), own)
    torch.testing.assert_close(ops.linear(module, hidden).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("inputs", [9, 40, 256, 2100])
@pytest.mark.parametrize("outputs", [37, 128])
def test_a_row_has_the_same_bits_in_any_batch(ops: LinearOps, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """Few rows and many are computed in two ways, which sum in the same order."""
    module = module_of(outputs, inputs, dtype=dtype)
    hidden = torch.randn(1, 230, inputs)
    together = ops.linear(module, hidden)
    for first, count in ((0, 1), (3, 2), (90, 17), (131, 99), *((2 * rows, rows) for rows in range(62, 74))):
        assert torch.equal(ops.linear(module, hidden[:, first : first + count]), together[:, first : first + count])


def test_the_same_bits_with_more_threads(ops: LinearOps) -> None:
    module, hidden = module_of(3000, 256), torch.randn(40, 256)
    one = ops.linear(module, hidden)
    ops.set_threads(3)
    try:
        assert all(torch.equal(ops.linear(module, hidden), one) for _ in range(200))
    finally:
        ops.set_threads(1)


def test_weights_in_16_bits_give_the_bits_of_the_same_in_32(ops: LinearOps) -> None:
    narrow = module_of(48, 320, dtype=torch.bfloat16)
    wide = module_of(48, 320)
    wide.weight.data, wide.bias.data = narrow.weight.data.float(), narrow.bias.data
    hidden = torch.randn(9, 320)
    assert torch.equal(ops.linear(narrow, hidden), ops.linear(wide, hidden))


def test_rows_that_are_not_contiguous_are_read_all_the_same(ops: LinearOps) -> None:
    module, hidden = module_of(8, 32), torch.randn(32, 5).t()
    torch.testing.assert_close(ops.linear(module, hidden), nn.functional.linear(hidden, module.weight, module.bias))


def test_weights_that_lie_otherwise_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        struct_of(torch.randn(4, 8).t())
    with pytest.raises(ValueError, match="float32"):
        struct_of(torch.randn(4, 8), torch.randn(4).bfloat16())


def test_all_linear_modules_of_a_model_are_computed_so(ops: LinearOps) -> None:
    model = nn.Sequential(module_of(16, 8), nn.ReLU(), module_of(4, 16))
    hidden = torch.randn(3, 8)
    expected = model(hidden)
    install(model, ops)
    assert ctypes.sizeof(struct_of(model[0].weight)) == 40  # as C lays it out
    torch.testing.assert_close(model(hidden), expected)
    assert not isinstance(model[1].forward, type(model[0].forward))
