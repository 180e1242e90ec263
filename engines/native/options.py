"""What the native engine is told when it starts."""

from engines.handover_options import HandoverOptions
from planner.kv_capacity import KvInAll, KvPerDevice, KvSize


class NativeOptions(HandoverOptions, frozen=True, kw_only=True):
    """Everything the engine core needs to know. Travels to the core as its first frame."""

    model_directory: str
    device_ids: tuple[str, ...]
    device_memory_bytes: int  # budget of each device
    python: str = ""  # interpreter of the engine's processes; empty: the caller's own
    visible: tuple[str, ...] = ()  # GPU of each of ``device_ids``, by UUID; empty: stages compute on the CPU
    dtype: str = "auto"
    max_model_len: int = 0  # tokens; 0: as the model says, within the KV capacity
    kv_cache_bytes: int = 64 << 20  # over all decoders
    kv_device_bytes: int = 0  # on each device that carries a stage, instead; 0: of one size, whatever the layout
    kv_block_tokens: int = 16
    prefix_caching: bool = True  # full KV blocks are kept for prompts that begin alike
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_micro_batches: int = 0  # 0: as many as measures fastest
    threads: int = 0  # of all stages together; 0: the cores this process may use
    threads_per_device: int = 0  # that a stage has at most, however few stages there are; 0: it may have all
    nice: int = 10
    hang_deadline_s: float = 60.0
    copy_bytes_per_s: int = 0  # of KV in the rounds of a handover, at most; 0: so that steps keep their pace
    adapters: tuple[tuple[str, str], ...] = ()  # name and directory of each LoRA adapter
    parameters: str = ""  # address of the keeper of parameters; empty: none are kept
    cache_directory: str = ""  # for compiled kernels; empty: the user's cache directory

    @property
    def kv_size(self) -> KvSize:
        """How large the KV cache of a layout is."""
        if self.kv_device_bytes:
            return KvPerDevice(device_bytes=self.kv_device_bytes, block_tokens=self.kv_block_tokens)
        return KvInAll(total_bytes=self.kv_cache_bytes, block_tokens=self.kv_block_tokens)


def micro_batches_for(options: NativeOptions, *, num_stages: int, cores: int) -> int:
    """Return how many micro-batches may be in flight.

    On the CPU the stages compete for the cores: more micro-batches than cores only make each one smaller (measured
    with tests/bench/micro_batches.py), so the default is the number of stages, at most the number of cores.
    """
    if options.max_micro_batches:
        return min(options.max_micro_batches, num_stages)
    return max(1, min(num_stages, cores))


def threads_per_stage(*, num_stages: int, threads: int, per_device: int = 0) -> int:
    """Return the torch threads of each stage, so that all active stages together stay within ``threads``.

    Args:
        per_device: More a stage does not have; 0: no such bound.
    """
    share = max(1, threads // num_stages)
    return min(per_device, share) if per_device else share
