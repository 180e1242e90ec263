"""What an engine with a server of its own is told when it starts, whichever it is."""

import msgspec

from engines.handover_options import HandoverOptions
from engines.served.handovers import HandoverSetup
from engines.served.ranks import Ranks


class ServedOptions(HandoverOptions, frozen=True, kw_only=True):
    """Everything about one engine. Sizes are of the whole replica unless a name says otherwise."""

    python: str  # interpreter of the environment that has the engine
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
    kv_block_tokens: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    threads: int = 0  # of all ranks together; 0: the cores this process may use
    nice: int = 10  # of the processes that compute
    args: tuple[str, ...] = ()  # passed through to the engine's command line
    env: dict[str, str] = msgspec.field(default_factory=dict)
    start_deadline_s: float = 600.0
    hang_deadline_s: float = 60.0
    parameters: str = ""  # address of the keeper of parameters; empty: none are kept


def threads_per_rank(options: ServedOptions, *, cores: int) -> int:
    """Return the threads of each rank, so that all ranks together stay within what they may use."""
    return max(1, (options.threads or cores) // len(options.device_ids))


def handover_setup(options: ServedOptions, *, kv_capacity_blocks: int) -> HandoverSetup:
    """Return what refactorings need to know of an engine with these options."""
    return HandoverSetup(
        ranks=Ranks(device_ids=options.device_ids, tensor_parallel=options.tensor_parallel),
        cuda=options.cuda,
        device_memory_bytes=options.device_memory_bytes,
        kv_block_tokens=options.kv_block_tokens,
        kv_capacity_blocks=kv_capacity_blocks,
        limits=options.handover_limits,
        verify_checksums=options.verify_checksums,
    )
