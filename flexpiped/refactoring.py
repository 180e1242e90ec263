"""The one place through which a refactoring enters, whoever asks for it. One at a time.

    ask --resolve--> target --check--> feasible --start--> running --+--> done
          |                    |                                    +--> aborted (rolled back, nothing lost)
          +--> NoFeasiblePlan  +--> RefactoringRefused              +--> failed  (the engine died)

What is asked for is resolved and checked by ``proposals``. It is carried out by the engine in place, or where that
cannot be by a second instance: a replica handover. Replicas that come or leave enter here, too. Progress is published
as events; whoever waits follows those.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from engines.closing import closing
from engines.errors import (
    EngineError,
    RefactoringAborted,
    RefactoringBusy,
    RefactoringRefused,
)
from engines.protocol import Engine, RefactorProgress
from flexpiped import log_events
from flexpiped.events import EventKind, EventLog
from flexpiped.handover_records import (
    HandoverRecord,
    HandoverResult,
    Proposal,
    TargetResolver,
    Wanted,
    Way,
    progress_to_wire,
    proposal_to_wire,
    record_to_wire,
)
from flexpiped.proposals import ONLY_ONE, OtherEngine, Proposals, ReplicaFleet, ReplicaHandover, scaled
from planner.handover import HandoverPhase
from planner.layout import Pipeline

HISTORY = 50


async def nothing_to_settle() -> None:
    """For whom nothing is kept on disk."""


@dataclass(slots=True, kw_only=True)
class _Running:
    number: int
    proposal: Proposal
    started_s: float
    cancel: Callable[[], Awaitable[bool]]
    last: RefactorProgress | None = None
    phases_s: dict[HandoverPhase, float] = field(default_factory=dict)

    def take(self, report: RefactorProgress) -> None:
        """Note a report; the time since the one before it was spent in the phase of that one."""
        if self.last is not None:
            before, spent_s = self.last.phase, report.elapsed_s - self.last.elapsed_s
            self.phases_s[before] = self.phases_s.get(before, 0.0) + spent_s
        self.last = report

    def describe(self, now_s: float) -> str:
        phase = "starting" if self.last is None else f"in phase {self.last.phase.value} ({self.last.message})"
        return f"handover #{self.number}, {self.proposal.stages_text}, is {phase} since {now_s - self.started_s:.1f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A refactoring that has begun: its number, and the event after which its progress follows."""

    number: int
    proposal: Proposal
    since: int


class Refactorings:
    """Runs refactorings of one engine, one at a time. Used on one event loop only.

    Args:
        engine, resolver: Those of now; they raise ``EngineError`` while there is none.
        replica: Makes a replica handover to a pipeline, of the replica of that number (None: the main one); None where
            no second instance can be had.
        fleet: The replicas; None where there is only one, and never more.
        other_engine: Finds an engine by its name, or raises ``UnsupportedByEngine``; it may block.
        settled: Returns when what was published is on disk: a refactoring that has been promised is not forgotten.
        numbers: Of refactorings, over all models of the daemon.
        planning: Held while one is planned: models that share devices plan one after the other.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine],
        resolver: Callable[[], TargetResolver],
        events: EventLog,
        replica: Callable[[Pipeline, int | None], ReplicaHandover] | None = None,
        fleet: ReplicaFleet | None = None,
        other_engine: Callable[[str], OtherEngine] | None = None,
        settled: Callable[[], Awaitable[None]] = nothing_to_settle,
        monotonic_clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        numbers: Iterator[int] | None = None,
        planning: asyncio.Lock | None = None,
    ) -> None:
        self._engine = engine
        self._proposals = Proposals(
            engine=engine, resolver=resolver, has_replica=replica is not None, fleet=fleet, other_engine=other_engine
        )
        self._numbers = count(1) if numbers is None else numbers
        self._planning = planning or asyncio.Lock()
        self._settled = settled
        self._events = events
        self._replica = replica
        self._fleet = fleet
        self._monotonic_clock = monotonic_clock
        self._wall_clock = wall_clock
        self._deciding = False  # a request is between its acceptance and its start
        self._running: _Running | None = None
        self._context = copy_context()  # log lines bear the model's name, whoever asks for a change
        self._task: asyncio.Task[None] | None = None
        self._history: deque[HandoverRecord] = deque(maxlen=HISTORY)

    @property
    def history(self) -> tuple[HandoverRecord, ...]:
        """The last refactorings that ended, oldest first."""
        return tuple(self._history)

    @property
    def under_way(self) -> str | None:
        """The refactoring under way in words, None when there is none."""
        return None if self._running is None else self._running.describe(self._monotonic_clock())

    async def propose(self, wanted: Wanted) -> Proposal:
        """Say what ``start`` would do. Moves nothing, and is answered at any time.

        Raises:
            PlannerError, EngineError
        """
        return await self._proposals.propose(wanted)

    async def start(self, wanted: Wanted) -> Started | Proposal:
        """Begin a refactoring, or return the proposal if the wanted layout is already in force.

        Raises:
            RefactoringBusy: Another one is under way; the message says which and where it stands.
            RefactoringRefused: It does not fit; the message has the numbers. Nothing moved.
            PlannerError, EngineError
        """
        if self._running is not None:
            raise RefactoringBusy(f"busy: {self.under_way}")
        if self._deciding:
            raise RefactoringBusy("busy: another refactoring is being planned")
        async with self._planning_alone():
            proposal = await self.propose(wanted)
            if not proposal.changes_something:
                return proposal
            if not proposal.check.feasible:
                raise RefactoringRefused("; ".join(proposal.check.sentences))
            started = self._begin(proposal)
        await self._settled()
        return started

    @asynccontextmanager
    async def _planning_alone(self) -> AsyncIterator[None]:
        self._deciding = True
        try:
            async with self._planning:
                yield
        finally:
            self._deciding = False

    @property
    def coming(self) -> tuple[Pipeline, ...]:
        """The pipelines that the refactoring under way leads to: their devices are not free any more."""
        if self._running is None:
            return ()
        proposal = self._running.proposal
        return (proposal.target,) if proposal.scale is None else tuple(proposal.scale.add)

    def bring_back(self, pipelines: Sequence[Pipeline]) -> Started:
        """Begin to start the replicas that were there before a restart, beside the main one that serves.

        Raises:
            RefactoringBusy: Another refactoring is under way.
            EngineError: None serves, or there is only one replica here.
        """
        if self._running is not None or self._deciding:
            raise RefactoringBusy("busy: another refactoring is under way")
        if self._fleet is None:
            raise RefactoringRefused(ONLY_ONE)
        current = self._engine().pipeline
        return self._begin(scaled(current, self._fleet.plan_restart(pipelines)))

    async def ended(self, started: Started) -> HandoverRecord:
        """Return how a refactoring went, once it has ended."""
        if self._running is not None and self._running.number == started.number and self._task is not None:
            await asyncio.shield(self._task)
        return next(record for record in reversed(self._history) if record.number == started.number)

    async def cancel(self) -> bool:
        """Roll back the refactoring under way; False when there is none or it is past its commit point."""
        return self._running is not None and await self._running.cancel()

    async def close(self) -> None:
        """Cancel what is under way and return when it has ended."""
        if self._task is not None and not self._task.done():
            if self._running is not None:
                with suppress(EngineError):  # an engine that is gone has ended it already
                    await self._running.cancel()
            await self._task

    def _begin(self, proposal: Proposal) -> Started:
        reports, cancel = self._ways(proposal)
        running = _Running(
            number=next(self._numbers), proposal=proposal, started_s=self._monotonic_clock(), cancel=cancel
        )
        self._running = running
        since = self._events.last_sequence
        self._publish(running, f"plan: {proposal.stages_text}", state="plan", **proposal_to_wire(proposal))
        self._task = asyncio.create_task(
            self._run(running, reports), name=f"refactoring-{running.number}", context=self._context.copy()
        )
        return Started(number=running.number, proposal=proposal, since=since)

    def _ways(self, proposal: Proposal) -> tuple[AsyncIterator[RefactorProgress], Callable[[], Awaitable[bool]]]:
        """Return what carries the proposal out, and what cancels that."""
        if proposal.engine_after:
            replica = self._proposals.find_other(proposal.engine_after).replica(proposal.target)
            return replica.run(), replica.cancel
        if proposal.scale is not None and self._fleet is not None:
            scaling = self._fleet.carry_out(proposal.scale)
            return scaling.run(), scaling.cancel
        if proposal.way is Way.REPLICA and self._replica is not None:
            replica = self._replica(proposal.target, proposal.on)
            return replica.run(), replica.cancel
        engine = self._proposals.engine_on(proposal.on)
        return engine.refactor(proposal.target), engine.cancel_refactor

    async def _run(self, running: _Running, reports: AsyncIterator[RefactorProgress]) -> None:
        log_events.refactoring_started(number=running.number, stages=running.proposal.stages_text)
        result, message = HandoverResult.FAILED, "it ended without a last report"
        try:
            async with closing(reports):
                async for progress in reports:
                    running.take(progress)
                    message = progress.message
                    self._publish(running, message, state="progress", progress=progress_to_wire(progress))
                    if progress.phase is HandoverPhase.DONE:
                        result = HandoverResult.DONE
        except (RefactoringAborted, RefactoringRefused, RefactoringBusy) as error:
            result, message = HandoverResult.ABORTED, str(error)
        except EngineError as error:
            result, message = HandoverResult.FAILED, str(error)
        finally:
            self._finish(running, result, message)

    def _finish(self, running: _Running, result: HandoverResult, message: str) -> None:
        record = HandoverRecord(
            number=running.number,
            stages_before=running.proposal.current.granularity,
            stages_after=running.proposal.target.granularity,
            result=result,
            message=message,
            finished_unix_s=self._wall_clock(),
            duration_s=self._monotonic_clock() - running.started_s,
            layers_moved=running.proposal.layers_moved,
            last=running.last,
            phases_s=running.phases_s,
            way=running.proposal.way,
            engine_before=running.proposal.engine_before,
            engine_after=running.proposal.engine_after,
            what=running.proposal.stages_text,
        )
        self._history.append(record)
        self._running = None
        log_events.refactoring_ended(number=record.number, result=result.value, duration_s=record.duration_s)
        how = f"ended in {record.duration_s:.2g} s: {message}"
        self._publish(running, how, state="ended", record=record_to_wire(record))

    def _publish(self, running: _Running, message: str, **fields: Any) -> None:
        self._events.publish(EventKind.REFACTORING, message, handover=running.number, **fields)
