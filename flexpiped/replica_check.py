"""Is a second instance the way to another layout, why, and do the devices have room for both?"""

from dataclasses import replace
from typing import Final

from engines.protocol import Engine, EngineCapabilities, RefactorCheck
from engines.validation import refusal_of
from flexpiped.handover_records import TargetResolver, Wanted
from planner.layout import Pipeline
from planner.memory import KvBudget

ASKED_FOR: Final = "it was asked for"
# What the engine in force says of a layout that another engine is to have: nothing.
OF_ANOTHER_ENGINE: Final = RefactorCheck(feasible=False, sentences=(), needs_replica=True)


def why_replica(wanted: Wanted, *, capabilities: EngineCapabilities, check: RefactorCheck) -> str | None:
    """Return why a second instance has to do it; None: it is done in place, or not at all.

    1. Asked for.
    2. The engine says that it cannot in place, but a second instance could.
    3. The engine changes no layout in place; its check says why.
    """
    said = "; ".join(check.sentences)
    if wanted.replica:  # 1
        return ASKED_FOR
    if check.needs_replica:  # 2
        return said
    if not capabilities.refactors_in_place:  # 3
        return said or f"{capabilities.name} does not change its layout in place"
    return None


async def check_replica(
    engine: Engine,
    target: Pipeline,
    *,
    resolver: TargetResolver,
    check: RefactorCheck,
    why: str,
    is_another_engine: bool = False,
) -> RefactorCheck:
    """Say whether a second instance with ``target`` could take over: memory of both instances counts in full.

    ``check`` is what the engine says of doing it in place.

    Raises:
        PlannerError, EngineError
    """
    capabilities = replace(engine.capabilities, max_stages=target.granularity)  # another instance may have more ranks
    refusal = refusal_of(target, current=engine.pipeline, capabilities=capabilities)
    if refusal is not None and not check.needs_replica:
        return RefactorCheck(feasible=False, sentences=(refusal,))
    counters = await engine.counters()
    memory = resolver.check_second(
        current=engine.pipeline,
        target=target,
        kv=KvBudget(
            block_tokens=counters.kv_block_tokens,
            capacity_blocks=counters.kv_blocks_capacity,
            live_blocks=counters.kv_blocks_used,
        ),
        is_another_engine=is_another_engine,
    )
    what = f"by a second instance on {', '.join(target.device_ids)}, as {why}"
    if not memory.fits:
        return RefactorCheck(feasible=False, sentences=(f"{what}: no room beside the first", *memory.sentences))
    return RefactorCheck(feasible=True, sentences=memory.sentences, moves=(what,))
