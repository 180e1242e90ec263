"""The memory that stages share with others, in the words of ``planner.neighbourhood``. Pure.

CPU devices share that of their host, whatever each one's budget is; a GPU or MIG instance has its own.
"""

from collections.abc import Mapping, Sequence

from engines.offers import KvRange
from engines.protocol import EngineCounters, StageStatus
from planner.layout import Pipeline
from planner.neighbourhood import Pool, PoolShare, ReplicaKv
from topology.device import Device, DeviceKind
from topology.host_memory import FreeMemory


def pool_names(devices: Sequence[Device], host: FreeMemory | None) -> dict[str, str]:
    """Return the name of the pool of each device."""
    of_host = "the host" if host is None else host.bound
    return {each.id: of_host if each.kind is DeviceKind.CPU else each.id for each in devices}


def pools_of(devices: Sequence[Device], stages: Sequence[StageStatus], *, host: FreeMemory | None) -> tuple[Pool, ...]:
    """Return the pools; ``stages`` are those of all replicas, which count as ours on a GPU."""
    names = pool_names(devices, host)
    gpus = [each for each in devices if each.kind is not DeviceKind.CPU]
    found = [
        Pool(name=gpu.id, free_bytes=gpu.memory_usable_bytes - _held_on(gpu.id, stages), is_shared=gpu.is_shared)
        for gpu in gpus
    ]
    if len(gpus) < len(devices):
        name = next(names[each.id] for each in devices if each.kind is DeviceKind.CPU)
        found.append(Pool(name=name, free_bytes=None if host is None else host.free_bytes, is_host=True))
    return tuple(found)


def _held_on(device_id: str, stages: Sequence[StageStatus]) -> int:
    """Return what we hold there; tensor-parallel ranks hold a stage in equal parts."""
    here = [stage for stage in stages if device_id in stage.device_ids]
    return sum((stage.weights_bytes + stage.kv_mapped_bytes) // len(stage.device_ids) for stage in here)


def replica_kv(
    number: int,
    counters: EngineCounters,
    pipeline: Pipeline,
    *,
    mapped_bytes: Sequence[int],
    kv_range: KvRange | None,
    kv_bytes_per_token: int,
    pool_of: Mapping[str, str],
) -> ReplicaKv:
    """Return the KV cache of a replica: its KV blocks lie in equal parts with all decoders of the model.

    Args:
        mapped_bytes: What is backed by memory now, of each stage.
        kv_range: None where the engine cannot change its KV cache: then all of it is there already.
        kv_bytes_per_token: Over all decoders.
    """
    blocks = counters.kv_blocks_capacity
    per_decoder = kv_bytes_per_token * counters.kv_block_tokens / pipeline.num_decoders
    shares: dict[str, PoolShare] = {}
    for stage, mapped in zip(pipeline.stages, mapped_bytes, strict=True):
        ranks = len(stage.device_ids)
        block_bytes = per_decoder * stage.num_decoders / ranks
        there = mapped / ranks if kv_range is not None else block_bytes * blocks
        for name in (pool_of[device] for device in stage.device_ids if device in pool_of):
            before = shares.get(name, PoolShare(pool=name, block_bytes=0.0, mapped_bytes=0))
            shares[name] = PoolShare(
                pool=name, block_bytes=before.block_bytes + block_bytes, mapped_bytes=before.mapped_bytes + int(there)
            )
    return ReplicaKv(
        number=number,
        blocks=blocks,
        least_blocks=blocks if kv_range is None else kv_range.least_blocks,
        most_blocks=blocks if kv_range is None else kv_range.most_blocks,
        shares=tuple(shares.values()),
    )
