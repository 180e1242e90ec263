"""A refactoring of the engine core: whether it may begin, and its handover from the first step to the last."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from engines.errors import RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.native.feasibility import check_refactor
from engines.native.handover import HandoverRunner
from engines.protocol import RefactorCheck, RefactorProgress
from planner.handover import HandoverPhase
from planner.layout import Pipeline

if TYPE_CHECKING:
    from engines.native.engine_core import EngineCore


def check(core: "EngineCore", target: Pipeline, *, needs_cached: bool = False) -> RefactorCheck:
    """Return the verdict on going to ``target`` now.

    Args:
        needs_cached: Whether also the KV blocks must fit that are kept for prompts to come.
    """
    live, cached = core.scheduler.kv_blocks_used, core.scheduler.kv_blocks_cached
    if needs_cached:
        live, cached = live + cached, 0
    return check_refactor(
        core.boot,
        current=core.pipeline,
        target=target,
        live_blocks=live,
        cached_blocks=cached,
        adapter_bytes=core.adapters.bytes_of_each_worker,
    )


async def refactor(core: "EngineCore", target: Pipeline, *, on_progress: Callable[[RefactorProgress], None]) -> None:
    """Go to ``target`` while requests run.

    Raises:
        RefactoringBusy, RefactoringRefused: Nothing has begun.
        RefactoringAborted: It was rolled back.
    """
    if core.handover is not None:
        raise RefactoringBusy(f"another refactoring is under way: {core.handover.describe()}")
    if core.recovering:
        raise RefactoringBusy("a lost worker is being recovered")
    if core.kv.is_under_way:
        raise RefactoringBusy("the number of KV blocks is being changed")
    verdict = check(core, target)
    if not verdict.feasible:
        raise RefactoringRefused("; ".join(verdict.sentences))
    if not check(core, target, needs_cached=True).feasible:
        core.scheduler.drop_cached()  # rather than refuse a layout for what nobody needs now
    core.handover = HandoverRunner(core, target, on_progress=on_progress)
    try:
        result = await core.handover.run()
        await core.follow_layout()
    finally:
        core.handover = None
    if result.state.phase is HandoverPhase.ABORTED:
        raise RefactoringAborted(result.state.reason or "aborted")
    core.totals.refactorings += 1  # only now may another one begin
