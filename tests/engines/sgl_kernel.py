"""In the place of SGLang's kernels in the tests' environment: what serving text on the CPU calls, in torch."""

import torch

__version__ = "0.4.10"
_MASK = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, *_shapes):
    """Write where the new tokens of each request are, one request after the other."""
    taken = 0
    for index, request in enumerate(req_pool_indices.tolist()):
        start, end = int(start_offset[index]), int(end_offset[index])
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[request, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def murmur_hash32_cpu(seed, positions, col_indices):
    """Return MurmurHash3 of (seed, position, column) for each row and column, as SGLang's kernel for GPUs has it."""
    wide = seed.view(torch.int64)
    hashed = torch.zeros(1, dtype=torch.int64)
    for block in (wide & _MASK, (wide >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        hashed = _mix(hashed, block)
    hashed = _mix(hashed[:, None], col_indices.to(torch.int64)[None, :] & _MASK) ^ 16
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & _MASK
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & _MASK
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def _mix(hashed, block):
    block = _rotated((block * 0xCC9E2D51) & _MASK, 15)
    hashed = _rotated(hashed ^ ((block * 0x1B873593) & _MASK), 13)
    return (hashed * 5 + 0xE6546B64) & _MASK


def _rotated(value, by):
    return ((value << by) | (value >> (32 - by))) & _MASK


_LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")
_LIBRARY.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_LIBRARY.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")


def __getattr__(name):
    """Importing any other kernel is fine, calling it is not."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args, **_kwargs):
        raise NotImplementedError(f"sgl_kernel has no {name} here")

    missing.__name__ = name
    return missing
