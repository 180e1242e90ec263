"""Whether a refactoring would be accepted: decided before anything moves, with the numbers."""

from collections.abc import Sequence

from engines.errors import UnsupportedByEngine
from engines.native.boot import Boot, check_pipeline
from engines.protocol import RefactorCheck
from planner.layout import Pipeline
from planner.memory import KvBudget, MemoryCheck, check_memory
from planner.moves import describe_moves, moves
from topology.device import Device, DeviceKind


def check_refactor(
    boot: Boot,
    *,
    current: Pipeline,
    target: Pipeline,
    live_blocks: int,
    cached_blocks: int = 0,
    adapter_bytes: int = 0,
) -> RefactorCheck:
    """Return the verdict on going from ``current`` to ``target`` with ``live_blocks`` KV blocks in use.

    Args:
        cached_blocks: Those kept for prompts to come: they are moved, too, but no memory is refused for them.
        adapter_bytes: What each device has of adapters, wherever layers lie.
    """
    options = boot.options
    if target == current:
        return RefactorCheck(feasible=False, sentences=("this layout is in force already",))
    try:
        check_pipeline(target, boot.context.family, options)
    except UnsupportedByEngine as error:
        return RefactorCheck(feasible=False, sentences=(str(error),))
    devices = _devices(boot, adapter_bytes)
    if refusal := _too_few_blocks(boot, current, target):
        return RefactorCheck(feasible=False, sentences=(refusal,))
    both, then = (_memory(boot, devices, each, target, live_blocks) for each in (current, None))
    found = moves(current, target, boot.graph, live_kv_slots=(live_blocks + cached_blocks) * options.kv_block_tokens)
    return RefactorCheck(
        feasible=both.fits and then.fits,
        sentences=(then if both.fits and not then.fits else both).sentences,
        moves=(describe_moves(found),),
    )


def too_large(boot: Boot, *, current: Pipeline, target: Pipeline | None, adapter_bytes: int) -> str:
    """Say on which device adapters of ``adapter_bytes`` leave too little for its layers; empty: they fit everywhere.

    Args:
        target: Of the handover under way, whose layers come beside those that are there; None: there is none.
    """
    devices = _devices(boot, adapter_bytes)
    checks = [_memory(boot, devices, None, current, live_blocks=0)]
    if target is not None:
        checks.append(_memory(boot, devices, current, target, live_blocks=0))
    return next(("; ".join(check.refusals) for check in checks if not check.fits), "")


def _devices(boot: Boot, adapter_bytes: int) -> tuple[Device, ...]:
    """Return the devices without what each has of adapters."""
    total = boot.options.device_memory_bytes
    return tuple(
        Device(
            id=device,
            kind=DeviceKind.CPU,
            memory_total_bytes=total,
            memory_reserved_bytes=min(adapter_bytes, total),
        )
        for device in boot.options.device_ids
    )


def _too_few_blocks(boot: Boot, current: Pipeline, target: Pipeline) -> str:
    """Say why the longest sequence would not fit, while both layouts exist or then; empty where it does."""
    size, limits = boot.options.kv_block_tokens, boot.limits
    for name, blocks in (
        ("both layouts together have", boot.kv_blocks_of(current, target)),
        ("that layout has", boot.kv_blocks_of(target)),
    ):
        if blocks < boot.least_kv_blocks:
            return (
                f"{name} KV cache for {blocks * size} tokens, "
                f"fewer than the longest request may have (max_model_len {limits.max_model_len})"
            )
    return ""


def _memory(
    boot: Boot, devices: Sequence[Device], current: Pipeline | None, target: Pipeline, live_blocks: int
) -> MemoryCheck:
    """Check with the KV blocks that there are then; where more are live, the youngest sequences give way.

    ``current`` None: once the target is the only layout.
    """
    capacity_blocks = boot.kv_blocks_of(target) if current is None else boot.kv_blocks_of(current, target)
    return check_memory(
        graph=boot.graph,
        current=current,
        target=target,
        devices=devices,
        kv=KvBudget(
            block_tokens=boot.options.kv_block_tokens,
            capacity_blocks=capacity_blocks,
            live_blocks=min(live_blocks, capacity_blocks),
        ),
    )
