"""In the place of SGLang's kernels in the tests' environment: what the torch_native path calls, in torch."""

__version__ = "0.4.10"


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, *_shapes):
    """Write where the new tokens of each request are, one request after the other."""
    taken = 0
    for index, request in enumerate(req_pool_indices.tolist()):
        start, end = int(start_offset[index]), int(end_offset[index])
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[request, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def __getattr__(name):
    """Importing any other kernel is fine, calling it is not."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args, **_kwargs):
        raise NotImplementedError(f"sgl_kernel has no {name} here")

    missing.__name__ = name
    return missing
