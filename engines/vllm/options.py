"""What the vLLM engine is told when it starts."""

from engines.served.options import ServedOptions


class VllmOptions(ServedOptions, frozen=True, kw_only=True):
    """Everything about one vLLM."""

    compile: bool = False


def num_kv_blocks(options: VllmOptions) -> int:
    """Return how many KV blocks ``kv_cache_bytes`` are, over all decoders. vLLM keeps one of them for itself."""
    block_bytes = options.num_decoders * options.kv_bytes_per_token * options.kv_block_tokens
    return num_kv_blocks_of(kv_cache_bytes=options.kv_cache_bytes, block_bytes=block_bytes)


def num_kv_blocks_of(*, kv_cache_bytes: int, block_bytes: int) -> int:
    """Return how many KV blocks of ``block_bytes`` each, over all decoders, vLLM is told to have."""
    return max(2, kv_cache_bytes // block_bytes)
