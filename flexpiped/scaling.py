"""Changes the number of replicas: which ones come or leave, and how that is carried out.

A replica has its devices for itself: two stages of one model never share one (FlexPipe, section 6). It enters where
every refactoring does, so it is one at a time with them, can be cancelled, and is told as they are.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Final

from engines.errors import EngineError, RefactoringAborted, RefactoringRefused
from engines.protocol import Engine, RefactorProgress
from flexpiped.handover_records import ScalePlan, TargetResolver, Wanted, stages_in_words
from flexpiped.replica import Replica
from flexpiped.replicas import Replicas
from flexpiped.supervisor import EngineFactory
from planner.errors import NoFeasiblePlan
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from topology.units import plural

_MOST: Final = 64  # replicas of one host


class Fleet:
    """The replicas, as refactorings see them.

    Args:
        replicas: Those of now; raises ``EngineError`` before there are any.
        factory: Of the kind of engine in force.
    """

    def __init__(
        self,
        *,
        replicas: Callable[[], Replicas],
        factory: Callable[[], EngineFactory],
        drain_deadline_s: float,
    ) -> None:
        self._replicas = replicas
        self._factory = factory
        self._drain_deadline_s = drain_deadline_s

    @property
    def serving(self) -> dict[int, int]:
        """Number of stages of each replica that serves, by its number."""
        found = ((each.number, each.engine) for each in self._replicas().all)
        return {number: engine.pipeline.granularity for number, engine in found if engine is not None}

    def replica(self, number: int) -> Replica:
        """Return a replica. Raises ``RefactoringRefused``: there is none of that number."""
        replicas = self._replicas()
        found = replicas.numbered(number)
        if found is None:
            numbers = ", ".join(str(each.number) for each in replicas.all)
            raise RefactoringRefused(f"there is no replica {number}; there are {numbers}")
        return found

    def engine_of(self, number: int) -> Engine:
        """Return the engine of a replica.

        Raises:
            RefactoringRefused: There is no such replica, or it does not serve now.
        """
        replica = self.replica(number)
        if replica.engine is None:
            raise RefactoringRefused(f"replica {number} does not serve: {replica.supervisor.supervision.reason}")
        return replica.engine

    def devices_beside(self, number: int | None) -> frozenset[str]:
        """Return the devices that other replicas than this one (None: the main one) have stages on."""
        replicas = self._replicas()
        return replicas.device_ids(but=replicas.main if number is None else self.replica(number))

    async def plan(self, wanted: Wanted, *, resolver: TargetResolver) -> ScalePlan:
        """Return which replicas come or leave.

        What there is, is read at once; only the search for places, which may take a while, runs in a thread.

        1. More: each gets devices that nobody has, with as many stages as are asked for, else as the main one has.
        2. Fewer: the one that is named first, then of the granularity that is named, those with the fewest requests.

        Raises:
            RefactoringRefused: There is no such replica, or none would be left.
            PlannerError: There is no room; the message has the numbers.
        """
        replicas, serving = self._replicas(), self.serving
        have, want = len(serving), wanted.replicas or 0
        if not 1 <= want <= _MOST:
            raise RefactoringRefused(f"there can be 1 to {_MOST} replicas, not {want}")
        if want >= have:
            if wanted.stages is None and wanted.layout is None:
                wanted = replace(wanted, stages=replicas.pipeline.granularity)
            taken = replicas.device_ids()
            add = await asyncio.to_thread(_places, wanted, have=have, want=want, taken=taken, resolver=resolver)
            return ScalePlan(before=have, after=want, add=add)  # 1
        leaving = self._leaving(wanted, replicas, have - want)  # 2
        return ScalePlan(before=have, after=want, remove=leaving)

    def plan_restart(self, pipelines: Sequence[Pipeline]) -> ScalePlan:
        """Return how replicas come back that were there before the daemon was started again."""
        have = len(self.serving)
        return ScalePlan(before=have, after=have + len(pipelines), add=tuple(pipelines), is_restart=True)

    def carry_out(self, plan: ScalePlan) -> "ScaleRunner":
        """Return what carries a plan out."""
        return ScaleRunner(self._replicas(), plan, factory=self._factory(), drain_deadline_s=self._drain_deadline_s)

    def _leaving(self, wanted: Wanted, replicas: Replicas, count: int) -> tuple[int, ...]:
        if wanted.on is not None:
            self.engine_of(wanted.on)

        def rank(replica: Replica) -> tuple[bool, bool, int, int]:
            stages = replica.supervisor.pipeline.granularity
            assert replica.engine is not None
            requests = len(replicas.flights.at(replica.engine))
            return replica.number != wanted.on, stages != wanted.stages, requests, -replica.number

        serving = sorted((each for each in replicas.all if each.engine is not None), key=rank)
        return tuple(each.number for each in serving[:count])


class ScaleRunner:
    """Carries one plan out: additions one after the other, then removals; it reports as ``Engine.refactor`` does."""

    def __init__(
        self,
        replicas: Replicas,
        plan: ScalePlan,
        *,
        factory: EngineFactory,
        drain_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replicas = replicas
        self._plan = plan
        self._factory = factory
        self._drain_deadline_s = drain_deadline_s
        self._clock = clock
        self._began_s = clock()
        self._said: asyncio.Queue[str] = asyncio.Queue()
        self._starting: asyncio.Task[Replica] | None = None
        self._is_cancelled = False
        self._added = 0
        self._not_started: list[str] = []

    async def cancel(self) -> bool:
        """Give up the replica that starts, and those after it. False where none starts."""
        if self._starting is None and self._added + len(self._plan.remove) > 0:
            return False
        self._is_cancelled = True
        if self._starting is not None:
            self._starting.cancel()
        return True

    async def run(self) -> AsyncIterator[RefactorProgress]:
        """Perform it and report; the last report has phase DONE.

        Raises:
            RefactoringAborted: A replica did not start, or that was cancelled; those before it serve.
        """
        for pipeline in self._plan.add:
            async for report in self._add(pipeline):
                yield report
            if self._not_started and not self._plan.is_restart:
                break
        if self._not_started:
            raise RefactoringAborted("; ".join((*self._not_started, self._serving())))
        for number in self._plan.remove:
            replica = self._replicas.numbered(number)
            if replica is None:  # it has failed for good meanwhile
                continue
            yield self._report(HandoverPhase.RETIRING, f"replica {number} drains")
            late = await self._removed(replica)
            gone_on = f", {late} of its requests went on at others" if late else ""
            yield self._report(HandoverPhase.RETIRING, f"replica {number} has ended{gone_on}")
        yield self._report(HandoverPhase.DONE, self._serving())

    async def _add(self, pipeline: Pipeline) -> AsyncIterator[RefactorProgress]:
        what = f"a replica of {stages_in_words(pipeline)} on {', '.join(pipeline.device_ids)}"
        yield self._report(HandoverPhase.PREPARING, f"{what} starts")
        if self._is_cancelled:
            raise RefactoringAborted(f"cancelled; {self._serving()}")
        adding = self._replicas.add(pipeline, factory=self._factory, on_progress=self._said.put_nowait)
        self._starting = asyncio.create_task(adding, name="replica-add")
        try:
            async for text in self._words(self._starting):
                yield self._report(HandoverPhase.PREPARING, f"{what}: {text}")
            await self._starting
        except asyncio.CancelledError:
            if not self._is_cancelled:
                raise
            raise RefactoringAborted(f"cancelled; {self._serving()}") from None
        except EngineError as error:
            self._not_started.append(f"{what} did not start: {error}")
        else:
            self._added += 1
        finally:
            starting, self._starting = self._starting, None
            if not starting.done():  # whoever reads the reports went away
                starting.cancel()
                await asyncio.wait([starting])

    async def _words(self, starting: "asyncio.Task[Replica]") -> AsyncIterator[str]:
        """Yield what the starting engine says, until it serves or has failed."""
        while not starting.done():
            saying = asyncio.create_task(self._said.get())
            try:
                await asyncio.wait([saying, starting], return_when=asyncio.FIRST_COMPLETED)
                if saying.done():
                    yield saying.result()
            finally:
                saying.cancel()

    async def _removed(self, replica: Replica) -> int:
        try:
            return await self._replicas.remove(replica, drain_deadline_s=self._drain_deadline_s)
        except EngineError as error:
            raise RefactoringAborted(f"{error}; {self._serving()}") from error

    def _serving(self) -> str:
        """Return what serves, in words: ``2 replicas serve: 1 of 2 stages, 2 of 4 stages``."""
        serving = [each for each in self._replicas.all if each.engine is not None]
        each_one = [f"{each.number} of {stages_in_words(each.supervisor.pipeline)}" for each in serving]
        count = len(serving)
        return f"{plural(count, 'replica')} serve{'s' * (count == 1)}: {', '.join(each_one) or 'none'}"

    def _report(self, phase: HandoverPhase, message: str) -> RefactorProgress:
        return RefactorProgress(
            phase=phase,
            message=message,
            elapsed_s=self._clock() - self._began_s,
            requests_live=len(self._replicas.flights),
        )


def _places(
    wanted: Wanted, *, have: int, want: int, taken: frozenset[str], resolver: TargetResolver
) -> tuple[Pipeline, ...]:
    """Return where replicas come, on devices that nobody has. Raises ``NoFeasiblePlan`` with the numbers."""
    found = []
    for number in range(have + 1, want + 1):
        try:
            pipeline = resolver.beside(wanted, taken=taken)
        except NoFeasiblePlan as error:
            held = f"{', '.join(sorted(taken))} are taken"
            raise NoFeasiblePlan(f"no room for replica {number}: {error} ({held})") from None
        found.append(pipeline)
        taken |= set(pipeline.device_ids)
    return tuple(found)
