"""What the SGLang engine is told when it starts."""

import msgspec


class SglangOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about one SGLang. Sizes are of the whole replica unless a name says otherwise."""

    python: str  # interpreter of the environment that has SGLang
    model_directory: str  # or a hub id
    served_model_name: str = ""  # by which clients ask for it; empty: ``model_directory``
    device_ids: tuple[str, ...]  # of the ranks, in rank order; ``tensor_parallel`` of them make one pipeline rank
    num_decoders: int
    kv_bytes_per_token: int  # of one decoder, over all its tensor-parallel ranks
    device_memory_bytes: int = 0  # budget of each device; 0: unknown
    cuda: bool = False
    tensor_parallel: int = 1
    dtype: str = "auto"
    max_model_len: int = 0  # tokens; 0: as the model says, within the KV capacity
    revision: str = ""
    tokenizer: str = ""  # directory or hub id; empty: the model's own
    trust_remote_code: bool = False
    hf_token_file: str = ""
    kv_cache_bytes: int = 64 << 20  # over all decoders
    kv_block_tokens: int = 1  # SGLang's page
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    threads: int = 0  # of all ranks together; 0: the cores this process may use
    nice: int = 10  # of the schedulers
    args: tuple[str, ...] = ()  # passed through to ``sglang.launch_server``
    env: dict[str, str] = {}
    start_deadline_s: float = 600.0
    hang_deadline_s: float = 60.0
    prepare_deadline_s: float = 120.0
    sync_deadline_s: float = 120.0
    commit_deadline_s: float = 5.0
    max_rounds: int = 8
    remainder_slots: int = 256
    slice_bytes: int = 512 << 10  # of KV copied in one piece between two steps
    verify_checksums: bool = False  # compare the live KV blocks of source and destination at commit (tests)


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


def threads_per_rank(options: SglangOptions, *, cores: int) -> int:
    """Return the threads of each rank, so that all ranks together stay within what they may use."""
    return max(1, (options.threads or cores) // len(options.device_ids))
