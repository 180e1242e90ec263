"""What every stage worker inherits from the core through fork, and the KV cache that it makes of that."""

from dataclasses import dataclass

from engines.checkpoint import Checkpoint
from engines.native.compute import Compute
from engines.native.family import Family
from engines.native.inbox import Inbox
from engines.native.kv_device import DeviceKV
from engines.native.kv_memory import KVMemory
from engines.native.kv_store import KVStore
from engines.native.lora import LoraModules
from engines.native.shared import SharedMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """Made by the core before the first fork."""

    family: Family
    checkpoint: Checkpoint
    shared: SharedMemory
    inboxes: tuple[Inbox, ...]
    core_inbox: Inbox
    num_slots: int
    kv_block_tokens: int
    nice: int
    lora: LoraModules  # what its adapters add
    parameters: str = ""  # address of the keeper of parameters; empty: there is none
    visible: tuple[str, ...] = ()  # worker by worker what ``open_compute`` is told; none: all of them compute in place


def kv_store_of(family: Family, shared: SharedMemory, compute: Compute, *, num_slots: int) -> KVStore:
    """Return an empty KV cache where a worker computes, for at most ``num_slots`` token slots."""
    num_decoders, num_kv_heads, head_dim = family.num_decoders, family.num_kv_heads, family.head_dim
    if compute.own_memory:
        return DeviceKV(
            compute.device,
            num_decoders=num_decoders,
            end_slot=lambda: shared.kv_end_slot,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=family.dtype,
        )
    return KVMemory(
        num_decoders=num_decoders,
        num_slots=num_slots,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=family.dtype,
    )
