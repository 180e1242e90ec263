"""The replicas of the model: each a supervised engine, and all together what serves requests.

    add: STARTING --started--> SERVING --remove--> DRAINING --empty, or late--> gone
                     | failed                          requests that are late go on at the others
                     v
                   gone

A request goes where it is expected to be finished first (``flexpiped.replica_routing``). When its replica dies or
leaves, it goes on at another from its last token; with none, it waits. One replica at least stays: that one sleeps
instead of leaving.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from engines.errors import EngineClosed, EngineDied, EngineError
from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from flexpiped.continuing import continued
from flexpiped.flight import Flight, Flights
from flexpiped.replica import Replica, ReplicaState
from flexpiped.replica_facts import ReplicaFacts
from flexpiped.replica_routing import route
from flexpiped.status import ReplicaStatus
from flexpiped.supervision import SHUTTING_DOWN, Supervision, SupervisorState
from flexpiped.supervisor import EngineFactory, Supervisor
from planner.layout import Pipeline


class MakeSupervisor(Protocol):
    """Makes the supervisor of a replica, not started yet."""

    def __call__(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        flights: Flights,
        on_change: Callable[[Supervision], None],
        on_progress: Callable[[str], None],
    ) -> Supervisor: ...


class Replicas:
    """All replicas. Used on one event loop.

    Args:
        make: Makes a supervisor; it is given whom to tell.
        facts: Makes what is to be known of a replica for routing.
        wait_deadline_s: So long a request waits for an engine; None: for ever.
        on_change: Told each new state of a replica with its reason.
        leaving: The LoRA adapters that no further request may name.
    """

    def __init__(
        self,
        *,
        make: MakeSupervisor,
        facts: Callable[[], ReplicaFacts] = ReplicaFacts,
        wait_deadline_s: float | None = None,
        on_change: Callable[[int, Supervision], None] = lambda _number, _supervision: None,
        leaving: Callable[[], frozenset[str]] = frozenset,
    ) -> None:
        self._make = make
        self._new_facts = facts
        self.wait_deadline_s = wait_deadline_s
        self._leaving_adapters = leaving
        self._on_change = on_change
        self.flights = Flights()
        self._all: list[Replica] = []
        self._numbers = 0
        self._changed = asyncio.Event()  # replaced at every change
        self._closing = ""
        self._leaving: set[asyncio.Task[int]] = set()

    # --- what is there ---

    @property
    def all(self) -> tuple[Replica, ...]:
        """Every replica, those that start or drain included, oldest first."""
        return tuple(self._all)

    @property
    def main(self) -> Replica:
        """The replica that stands for all where one is meant: the oldest that is not leaving."""
        return next((each for each in self._all if each.state is not ReplicaState.DRAINING), self._all[0])

    def numbered(self, number: int) -> Replica | None:
        """Return a replica by its number."""
        return next((each for each in self._all if each.number == number), None)

    @property
    def supervision(self) -> Supervision:
        """The state of the service: that of a replica that serves, else of one that may again."""
        best = min((self.main, *self._all), key=lambda each: (each.engine is None, each.has_failed))
        return best.supervisor.supervision

    @property
    def engine(self) -> Engine | None:
        """The main engine that serves now, None while there is none. Use ``ready_engine`` to wait for one."""
        return next(iter(self.engines), None)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines that serve now, the main one first."""
        return tuple(each.engine for each in self._all if each.engine is not None)

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """Those of the engine that serves, or of the last that did; None before the first. All have alike ones."""
        capabilities, leaving = self.main.supervisor.capabilities, self._leaving_adapters()
        if capabilities is None or not leaving:
            return capabilities
        return replace(capabilities, adapters=tuple(each for each in capabilities.adapters if each not in leaving))

    @property
    def pipeline(self) -> Pipeline:
        """The main pipeline in force, or while there is no engine the one to start with."""
        return self.main.supervisor.pipeline

    def status(self) -> tuple[ReplicaStatus, ...]:
        """Return how each of them is."""
        return tuple(self._status(each) for each in self._all)

    def _status(self, replica: Replica) -> ReplicaStatus:
        supervision, engine = replica.supervisor.supervision, replica.supervisor.engine
        is_ready = supervision.state is SupervisorState.READY
        return ReplicaStatus(
            number=replica.number,
            state=replica.state.value if is_ready else supervision.state.value,
            reason="" if is_ready else supervision.reason,
            requests=0 if engine is None else len(self.flights.at(engine)),
            engine=engine,
        )

    @property
    def pipelines(self) -> tuple[Pipeline, ...]:
        """The pipelines of all replicas, the main one first."""
        return tuple(each.supervisor.pipeline for each in self._all)

    @property
    def lasting_pipelines(self) -> dict[int, Pipeline]:
        """The pipelines of those that are to stay, by their numbers, the main one first."""
        lasting = [each for each in self._all if each.state is ReplicaState.SERVING and not each.has_failed]
        return {each.number: each.supervisor.pipeline for each in lasting or [self.main]}

    def device_ids(self, *, but: Replica | None = None) -> frozenset[str]:
        """Return the devices that hold stages of replicas."""
        return frozenset(
            device for each in self._all if each is not but for device in each.supervisor.pipeline.device_ids
        )

    def is_in_force(self, engine: Engine) -> bool:
        """Whether an engine takes requests."""
        return engine in self.engines

    # --- replicas come and go ---

    async def add(
        self, pipeline: Pipeline, *, factory: EngineFactory, on_progress: Callable[[str], None] = lambda _text: None
    ) -> Replica:
        """Start a replica beside those that are there, and return when it serves.

        Raises:
            EngineStartFailed, UnsupportedByEngine: There is no replica more than before.
        """
        self._numbers += 1
        number = self._numbers

        def on_change(supervision: Supervision) -> None:
            self._supervised(number, supervision)

        supervisor = self._make(
            factory=factory, pipeline=pipeline, flights=self.flights, on_change=on_change, on_progress=on_progress
        )
        replica = Replica(number=number, supervisor=supervisor, facts=self._new_facts())
        self._all.append(replica)
        try:
            await supervisor.start()
        except BaseException:
            self._all.remove(replica)
            await supervisor.close(f"replica {number} did not start")
            self._tell_change()
            raise
        replica.state = ReplicaState.SERVING
        self._tell_change()
        return replica

    async def remove(self, replica: Replica, *, drain_deadline_s: float) -> int:
        """Drain a replica and end it. Return how many requests went on at others, because they were late.

        Raises:
            EngineError: There is no other replica that serves.
        """
        others = [each for each in self._all if each is not replica and each.engine is not None]
        if not others:
            raise EngineError(f"replica {replica.number} is the only one that serves")
        replica.state = ReplicaState.DRAINING
        self._tell_change()
        if (engine := replica.supervisor.engine) is not None:
            with suppress(TimeoutError, EngineError):  # one that died has no requests left
                async with asyncio.timeout(drain_deadline_s):
                    await engine.drain()
        return await self._end(replica)

    async def close(self, reason: str = SHUTTING_DOWN) -> None:
        """End all engines; requests in flight end with ``EngineClosed``, which says ``reason``. Idempotent."""
        self._closing = reason
        for task in self._leaving:
            task.cancel()
        if self._leaving:
            await asyncio.wait(self._leaving)
        await asyncio.gather(*(each.supervisor.close(reason) for each in self._all))
        for each in self._all:
            await each.facts.close()
        self._tell_change()

    # --- rest ---

    @property
    def is_asleep(self) -> bool:
        """Whether the last engine has ended because nobody used it."""
        return len(self._all) == 1 and self.main.supervisor.is_asleep

    def sleep(self, reason: str) -> bool:
        """End the only engine until the next request. False where it is in use or not the only one."""
        return len(self._all) == 1 and self.main.supervisor.sleep(reason)

    def wake(self) -> None:
        """Start the engine again if it sleeps."""
        for each in self._all:
            each.supervisor.wake()

    # --- requests ---

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt as ``Engine.generate`` does, at one replica after the other. Close it to abort.

        Raises:
            InvalidRequest: Before the first chunk.
            EngineDied: No engine serves any more, or they keep dying over this request.
            EngineClosed: The daemon or the model is being stopped.
        """
        return continued(request, flights=self.flights, find=self._find)

    async def ready_engine(self, *, other_than: Engine | None = None) -> Engine:
        """Return an engine that serves, that of fewest requests, waiting for it where need be, and waking it.

        Raises:
            EngineDied: All have failed for good, or none serves within the time that a request may wait.
            EngineClosed: The daemon or the model is being stopped.
        """
        return min(await self._ready(other_than), key=lambda each: len(self.flights.at(each)))

    async def _find(self, request: GenerationRequest, flight: Flight, *, other_than: Engine | None) -> Engine:
        """Return the engine that a request boards: where it is to go, else where it is finished first."""
        if flight.destination is not None and self.is_in_force(flight.destination):
            return flight.destination
        flight.kv = flight.destination = None
        ready = await self._ready(other_than)
        engine = next(iter(ready)) if len(ready) == 1 else route(request, ready, flights=self.flights)
        ready[engine].facts.boards(request)
        return engine

    async def _ready(self, other_than: Engine | None) -> dict[Engine, Replica]:
        try:
            async with asyncio.timeout(self.wait_deadline_s):
                while True:
                    serving = ((each.engine, each) for each in self._all)
                    found = {engine: each for engine, each in serving if engine not in (None, other_than)}
                    if found:
                        return found
                    self._refuse_if_hopeless()
                    self.wake()
                    await self._changed.wait()
        except TimeoutError:
            reason = f"no engine has served within {self.wait_deadline_s:g} s: {self.supervision.reason}"
            raise EngineDied(reason) from None

    def _refuse_if_hopeless(self) -> None:
        if self._closing:
            raise EngineClosed(self._closing)
        if all(each.has_failed for each in self._all):
            raise EngineDied(self.main.supervisor.supervision.reason)

    # --- inside ---

    async def _end(self, replica: Replica) -> int:
        """End a replica; return how many requests were still there, such as those of clients that read slowly."""
        engine = replica.supervisor.engine
        left = self.flights.at(engine) if engine is not None else ()
        for flight in left:
            await flight.take_off()
        await replica.supervisor.close(f"replica {replica.number} is not needed any more")
        await replica.facts.close()
        if replica in self._all:
            self._all.remove(replica)
        self._tell_change()
        return len(left)

    def _supervised(self, number: int, supervision: Supervision) -> None:
        """A replica that has failed for good leaves, where others are."""
        self._tell_change()
        self._on_change(number, supervision)
        replica = self.numbered(number)
        if supervision.state is SupervisorState.FAILED and replica is not None and len(self._all) > 1:
            leaving = asyncio.create_task(self._end(replica), name=f"replica-{number}-failed")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
