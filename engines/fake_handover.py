"""The fake engine's refactorings: what is checked of a target, and the phases of one. Nothing moves."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from engines.errors import EngineError, RefactoringAborted, RefactoringBusy, RefactoringRefused
from engines.protocol import EngineCapabilities, RefactorCheck, RefactorProgress
from engines.validation import refusal_of
from planner.handover import HandoverPhase
from planner.layout import Pipeline

Sleep = Callable[[float], Awaitable[object]]
_Reports = asyncio.Queue[RefactorProgress | EngineError]

_FORWARD = (HandoverPhase.PREPARING, HandoverPhase.SYNCING, HandoverPhase.COMMITTING, HandoverPhase.RETIRING)
_CANCELLABLE = (HandoverPhase.PREPARING, HandoverPhase.SYNCING)


class FakeHandovers:
    """Those of one fake engine, one at a time.

    Args:
        phase_s: Duration of a phase, through ``sleep``.
        report: Returns the report of a phase.
        commit: Puts a pipeline in force.
        ended: Returns how the engine has ended, None while it lives.
    """

    def __init__(
        self,
        *,
        phase_s: float,
        sleep: Sleep,
        report: Callable[[HandoverPhase], RefactorProgress],
        commit: Callable[[Pipeline], None],
        ended: Callable[[], EngineError | None],
    ) -> None:
        self._phase_s = phase_s
        self._sleep = sleep
        self._report = report
        self._commit = commit
        self._ended = ended
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()
        self._task: asyncio.Task[None] | None = None
        self._phase: HandoverPhase | None = None
        self._is_cancelled = False
        self.total = 0

    def hold(self) -> None:
        """Keep one in the phase it is in (or starts with), until ``release``."""
        self._may_go_on.clear()

    def release(self) -> None:
        self._may_go_on.set()

    def ensure_none(self) -> None:
        """Raise ``RefactoringBusy`` while one is under way."""
        if self._phase is not None:
            raise RefactoringBusy(f"a refactoring is under way, in phase {self._phase.value}")

    async def run(self, target: Pipeline, check: RefactorCheck) -> AsyncIterator[RefactorProgress]:
        """Pass through the phases and report them; they go on though nobody reads."""
        self.ensure_none()
        if not check.feasible:
            raise RefactoringRefused("; ".join(check.sentences))
        reports = _Reports()
        self._phase = HandoverPhase.PREPARING
        self._task = asyncio.create_task(self._carry_out(target, reports), name="fake-refactoring")
        while True:
            report = await reports.get()
            if isinstance(report, EngineError):
                raise report
            yield report
            if report.phase is HandoverPhase.DONE:
                return

    def cancel(self) -> bool:
        """Roll back; False when there is none or it is past its commit point."""
        if self._phase not in _CANCELLABLE:
            return False
        self._is_cancelled = True
        self._may_go_on.set()
        return True

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _carry_out(self, target: Pipeline, reports: _Reports) -> None:
        for phase in _FORWARD:
            self._phase = phase
            reports.put_nowait(self._report(phase))
            await self._sleep(self._phase_s)
            await self._may_go_on.wait()
            if (end := self._ended()) is not None:
                self._phase = None
                reports.put_nowait(type(end)(str(end)))
                return
            if self._is_cancelled:
                self._roll_back(reports)
                return
            if phase is HandoverPhase.COMMITTING:
                self._commit(target)
        self._phase = None
        self.total += 1
        reports.put_nowait(self._report(HandoverPhase.DONE))

    def _roll_back(self, reports: _Reports) -> None:
        self._phase, self._is_cancelled = None, False
        reports.put_nowait(self._report(HandoverPhase.ROLLING_BACK))
        reports.put_nowait(self._report(HandoverPhase.ABORTED))
        reports.put_nowait(RefactoringAborted("cancelled before commit; rolled back, no request disturbed"))


def check_target(
    target: Pipeline, *, current: Pipeline, capabilities: EngineCapabilities, resident_ranks: int | None
) -> RefactorCheck:
    """Say whether a fake engine could change to ``target`` in place."""
    refusal = refusal_of(target, current=current, capabilities=capabilities)
    if refusal is None and not capabilities.refactors_in_place:
        refusal = "this engine does not change its layout in place"
    if refusal is not None:
        return RefactorCheck(feasible=False, sentences=(refusal,))
    if resident_ranks is not None and target.granularity > resident_ranks:
        refusal = f"{target.granularity} stages need as many ranks, {resident_ranks} are resident"
        return RefactorCheck(feasible=False, sentences=(refusal,), needs_replica=True)
    return RefactorCheck(feasible=True, sentences=("everything fits",), moves=moves(current, target))


def moves(current: Pipeline, target: Pipeline) -> tuple[str, ...]:
    """Name every decoder that changes its devices."""
    devices = ((i, current.stage_of(i).device_ids, target.stage_of(i).device_ids) for i in range(target.num_decoders))
    return tuple(f"decoder {i} {'+'.join(old)} -> {'+'.join(new)}" for i, old, new in devices if old != new)
