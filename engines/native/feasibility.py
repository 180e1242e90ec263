"""Whether a refactoring would be accepted: decided before anything moves, with the numbers."""

from engines.errors import UnsupportedByEngine
from engines.native.boot import Boot, check_pipeline
from engines.protocol import RefactorCheck
from planner.layout import Pipeline
from planner.memory import KvBudget, check_memory
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
    devices = tuple(
        Device(
            id=device,
            kind=DeviceKind.CPU,
            memory_total_bytes=options.device_memory_bytes,
            memory_reserved_bytes=min(adapter_bytes, options.device_memory_bytes),
        )
        for device in options.device_ids
    )
    check = check_memory(
        graph=boot.graph,
        current=current,
        target=target,
        devices=devices,
        kv=KvBudget(block_tokens=options.kv_block_tokens, capacity_blocks=boot.num_blocks - 1, live_blocks=live_blocks),
    )
    found = moves(current, target, boot.graph, live_kv_slots=(live_blocks + cached_blocks) * options.kv_block_tokens)
    return RefactorCheck(feasible=check.fits, sentences=check.sentences, moves=(describe_moves(found),))
