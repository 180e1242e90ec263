"""Matrix products by ``kernels/linear.c``: weights stay as the checkpoint has them, mapped, in 16 bits if they are.

Widening 16 bits to float32 is exact, so the result is that of weights converted before, at half the memory and half the
memory traffic, on which decoding mostly waits.
"""

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

_POINTER, _INT, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class LinearStruct(ctypes.Structure):
    """``Linear`` of ``kernels/linear.h``. Whoever has one keeps the tensors."""

    _fields_ = (
        *(("weight", _POINTER), ("bias", _POINTER)),
        *(("outputs", _INT), ("inputs", _INT), ("kind", _INT32)),
    )


def struct_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> LinearStruct:
    """Describe ``weight`` (outputs, inputs) and ``bias`` (outputs), in float32.

    Raises:
        ValueError: They do not lie in memory as the kernel reads them.
    """
    if not weight.is_contiguous() or (bias is not None and (bias.dtype, bias.stride(0)) != (torch.float32, 1)):
        raise ValueError("weights must be contiguous, biases float32")
    outputs, inputs = weight.shape
    address = None if bias is None else bias.data_ptr()
    return LinearStruct(weight.data_ptr(), address, outputs, inputs, _KINDS[weight.dtype])


class LinearOps:
    """The functions of ``kernels/linear.c``."""

    def __init__(self, library: Path) -> None:
        functions = ctypes.CDLL(str(library))
        self._linears = functions.flexpiped_linears
        self._linears.argtypes = (_POINTER, _INT32, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT32)
        self._linears.restype = None
        self._set_threads = functions.flexpiped_set_threads
        self._set_threads.argtypes, self._set_threads.restype = (_INT32,), None
        self._reads_float16 = bool(functions.flexpiped_reads_float16())

    def set_threads(self, threads: int) -> None:
        """Have so many threads at work in all kernels of this process."""
        self._set_threads(threads)

    def reads(self, dtype: torch.dtype) -> bool:
        """Say whether weights of this type need no conversion."""
        return dtype in _KINDS and (dtype is not torch.float16 or self._reads_float16)

    def linear(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """What ``nn.Linear.forward`` computes, in float32."""
        hidden = hidden.contiguous()
        described = struct_of(module.weight, module.bias)
        out = torch.empty(*hidden.shape[:-1], described.outputs)
        rows = hidden.numel() // described.inputs
        self._linears(
            ctypes.byref(described), 1, hidden.data_ptr(), described.inputs,
            ctypes.byref(_POINTER(out.data_ptr())), ctypes.byref(_INT(described.outputs)), rows, 0,
        )  # fmt: skip
        return out


def install(model: nn.Module, ops: LinearOps) -> None:
    """Have all linear modules of a float32 model on the CPU computed so. Before the first fork."""
    linears: list[Any] = [module for module in model.modules() if type(module) is nn.Linear]
    for module in linears:
        module.forward = partial(ops.linear, module)
