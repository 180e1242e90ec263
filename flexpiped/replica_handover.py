"""Carries a replica handover out: performs what ``planner.replica_steps`` decides on the supervisor's two engines.

Requests are taken over one by one. Each is taken off the first instance and goes on at the second with prompt, tokens
so far and, where that is the faster way, its KV cache; the next follows when it has got a token there, so that each
waits for itself only. Meanwhile the KV cache of the next one is carried, and that of the last one let go. Requests go
on token-exactly: greedy ones always, others where the engine's draws depend on seed and position.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import assert_never

from engines.errors import EngineDied, EngineError, RefactoringAborted
from engines.protocol import Engine, RefactorProgress
from engines.validation import unknown_parameter
from flexpiped import log_events
from flexpiped.flight import Flight
from flexpiped.kv_ahead import KvAhead
from flexpiped.kv_carrier import Carried, KvCarrier
from flexpiped.supervisor import EngineFactory, Supervisor
from planner import replica_events as e
from planner import replica_steps as r
from planner.handover import HandoverPhase
from planner.kv_route import KvRoute
from planner.layout import Pipeline


class ReplicaRunner:
    """One replica handover of the supervised engine to ``target``.

    Args:
        factory: Makes the second instance; None: one of the same kind as the first.
        carrier: Brings KV caches over, or has them computed again.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        target: Pipeline,
        *,
        factory: EngineFactory | None = None,
        carrier: KvCarrier | None = None,
        limits: r.ReplicaLimits = r.ReplicaLimits(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._supervisor = supervisor
        self._target = target
        self._factory = factory
        self._carrier = carrier or KvCarrier()
        self._kv = KvAhead(self._carrier)
        self._clock = clock
        self._state = r.ReplicaHandover(started_s=clock(), limits=limits)
        self._events: asyncio.Queue[e.Event | BaseException] = asyncio.Queue()  # an exception: the work has a bug
        self._work: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._first: Engine | None = None  # once it is not in force any more
        self._flights: deque[Flight] = deque()  # to be taken over
        self._staying: set[Flight] = set()

    async def cancel(self) -> bool:
        """Ask to roll back; False past the point where that can be."""
        if not self._state.cancellable:
            return False
        self._apply(e.Cancelled())  # at once: "ready" may be in the queue already
        self._tell(e.Cancelled())  # so that it is reported
        return True

    async def run(self) -> AsyncIterator[RefactorProgress]:
        """Perform it and report; the last report has phase DONE.

        Raises:
            RefactoringAborted: The second instance did not take over. What was in force is so still.
            EngineDied: The second instance, in force by then, has failed for good.
        """
        try:
            self._watching = asyncio.create_task(self._watch_first(), name="replica-first")
            if not self._state.finished:  # cancelled before it began
                self._apply(e.Begin())
            while not self._state.finished:
                yield self._report()
                self._apply(await self._next_event())
        finally:
            await self._clean_up()
        if self._state.phase is HandoverPhase.ABORTED:
            yield self._report()
            raise RefactoringAborted(r.describe(self._state))
        if self._state.taken < self._state.requests:
            raise EngineDied(r.describe(self._state))
        yield self._report()

    async def _next_event(self) -> e.Event:
        deadline_s = self._state.deadline_s
        timeout_s = None if deadline_s is None else max(0.0, deadline_s - self._clock())
        try:
            async with asyncio.timeout(timeout_s):  # and not wait_for, which may swallow a cancellation (Python 3.11)
                event = await self._events.get()
        except TimeoutError:
            return e.Tick()
        if isinstance(event, BaseException):
            raise event
        return event

    def _apply(self, event: e.Event) -> None:
        self._state, effects = r.step(self._state, event, now_s=self._clock())
        for effect in effects:
            match effect:
                case e.StartSecond():
                    self._start(self._start_second())
                case e.SwitchOver():
                    self._switch_over()
                case e.TakeOver():
                    self._start(self._take_over(self._flights.popleft()))
                case e.Commit():
                    self._start(self._commit())
                case e.EndFirst():
                    self._start(self._end_first())
                case e.DiscardSecond():
                    self._start(self._discard_second(self._work))
                case _:
                    assert_never(effect)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._work = asyncio.create_task(work, name="replica-work")
        self._work.add_done_callback(self._look_at)

    def _look_at(self, work: asyncio.Task[None]) -> None:
        """Effects tell how they end; one that raises would be waited for without end."""
        if not work.cancelled() and (error := work.exception()) is not None:
            self._events.put_nowait(error)

    def _tell(self, event: e.Event) -> None:
        self._events.put_nowait(event)

    def _report(self) -> RefactorProgress:
        state = self._state
        return RefactorProgress(
            phase=state.phase,
            message=r.describe(state),
            elapsed_s=self._clock() - state.started_s,
            epoch=self._supervisor.epoch,
            kv_bytes=state.copied_bytes,
            requests_live=len(self._supervisor.flights) if self._first is None else state.requests,
        )

    # --- the effects ---

    async def _watch_first(self) -> None:
        engine = self._supervisor.engine
        if engine is not None:
            self._tell(e.FirstDied(await engine.died()))

    async def _start_second(self) -> None:
        try:
            await self._supervisor.start_second(
                self._target, on_progress=lambda text: self._tell(e.Said(text)), factory=self._factory
            )
        except EngineError as error:
            self._tell(e.Failed(str(error)))
        else:
            self._tell(e.Said("ready"))
            self._tell(e.Ready())

    def _switch_over(self) -> None:
        """Done at once and not as a task: no cancellation comes between the decision and the switch."""
        try:
            self._first = self._supervisor.switch_over()
        except EngineError as error:
            self._tell(e.Failed(str(error)))
            return
        self._flights.extend(self._supervisor.flights.at(self._first) if self._first is not None else ())
        self._tell(e.Switched(len(self._flights)))

    async def _take_over(self, flight: Flight) -> None:
        """Let one request go on at the second instance. While that recovers from a death, the first one serves it."""
        try:
            second = await self._supervisor.ready_engine()
        except EngineError as error:
            self._tell(e.Failed(str(error)))
            return
        first = self._first
        if first is None or flight.engine is not first:  # it has ended, or went on by itself because the first died
            self._tell(e.Taken(goes_on=not flight.has_ended))
            return
        lost = None if flight.sampling is None else unknown_parameter(flight.sampling, second.capabilities)
        if lost is not None:
            self._stay(flight, second, lost)
            return
        carried = await self._kv.carry(flight, first=first, second=second)
        if self._flights:
            self._kv.begin(self._flights[0], first=first, second=second)
        try:
            taken = await self._move(flight, carried, second)
        finally:
            flight.kv = flight.destination = None
            self._kv.drop(carried, first=first, second=second)
        self._tell(taken)

    def _stay(self, flight: Flight, second: Engine, lost: str) -> None:
        """Let one request end where it is."""
        reason = f"the {second.capabilities.name} engine does not know its sampling parameter {lost}"
        log_events.request_not_taken_over(request=flight.request_id, reason=reason)
        self._staying.add(flight)
        self._tell(e.Stayed())

    async def _move(self, flight: Flight, carried: Carried, second: Engine) -> e.Taken:
        """Take one request off the first instance, and return when it has a token from the second."""
        if flight.engine is not self._first:  # meanwhile
            return e.Taken(goes_on=not flight.has_ended)
        flight.kv, flight.destination = carried.parcel, second
        began_s = self._clock()
        # Not taken along by a reader that is busy elsewhere, or by a request that is not admitted in time.
        is_there = await flight.take_off() and await self._has_gone_on(flight)
        if is_there:
            self._carrier.measured(carried, waited_s=self._clock() - began_s)
        copied = carried.parcel if is_there else None
        log_events.request_taken_over(
            request=flight.request_id,
            tokens=flight.num_tokens,
            route=(KvRoute.RECOMPUTE if copied is None else KvRoute.COPY).value,
            reason=carried.reason,
        )
        return e.Taken(copied_bytes=None if copied is None else copied.num_bytes)

    async def _has_gone_on(self, flight: Flight) -> bool:
        """Return when the request has got its next token, or False when it has waited long enough."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._state.limits.pace_s):
                await flight.goes_on()
                return True
        return False

    async def _commit(self) -> None:
        """Take off what has come to the first instance since: nothing, as it is not in force."""
        for flight in self._supervisor.flights.at(self._first) if self._first is not None else ():
            if flight not in self._staying:
                await flight.take_off()
        await self._kv.settle()
        self._tell(e.Committed())

    async def _end_first(self) -> None:
        first, deadline_s, reason = self._first, self._state.limits.drain_deadline_s, None
        if first is not None:
            try:
                async with asyncio.timeout(deadline_s):
                    await first.drain()
            except TimeoutError:
                reason = f"the first instance did not drain within {deadline_s:g} s and was ended"
            except EngineError:  # it died: it has ended already
                pass
            if self._watching is not None:
                self._watching.cancel()  # its end is asked for now
            await self._supervisor.end_first(first)
        self._tell(e.Ended(reason))

    async def _discard_second(self, starting: asyncio.Task[None] | None) -> None:
        if starting is not None:
            starting.cancel()
            await asyncio.wait([starting])
        await self._supervisor.discard_second(self._state.reason or "given up")
        self._tell(e.Discarded())

    async def _clean_up(self) -> None:
        """Leave no task behind, and no second instance if whoever reads the reports went away."""
        tasks = [task for task in (self._work, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self._kv.settle()
        await self._supervisor.discard_second("given up")
        if self._first is not None:
            for flight in self._supervisor.flights.at(self._first):
                await flight.take_off()
            await self._supervisor.end_first(self._first)
