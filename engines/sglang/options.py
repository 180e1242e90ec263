"""What the SGLang engine is told when it starts."""

from engines.served.options import ServedOptions


class SglangOptions(ServedOptions, frozen=True, kw_only=True):
    """Everything about one SGLang. A KV block is SGLang's page."""

    kv_block_tokens: int = 1
    max_positions: int = 0  # of the model; 0: unknown


def num_kv_tokens(options: SglangOptions) -> int:
    """Return how many tokens ``kv_cache_bytes`` hold, over all decoders: whole pages."""
    return num_kv_tokens_of(
        kv_cache_bytes=options.kv_cache_bytes,
        bytes_per_token=options.num_decoders * options.kv_bytes_per_token,
        page_tokens=options.kv_block_tokens,
    )


def num_kv_tokens_of(*, kv_cache_bytes: int, bytes_per_token: int, page_tokens: int) -> int:
    """Return how many tokens of ``bytes_per_token`` each, over all decoders, SGLang is told to have room for."""
    return max(2, kv_cache_bytes // (bytes_per_token * page_tokens)) * page_tokens
