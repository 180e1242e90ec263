"""Owns the engine: starts it, starts it again when it dies, and carries requests over token-exactly.

During a replica handover it owns two. One is in force at any time and gets the requests: the first, until
``switch_over`` puts the second in its place. ``flexpiped.replica_handover`` says when.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from engines.errors import EngineClosed, EngineDied, EngineError
from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from engines.restarts import Restart, RestartPolicy
from flexpiped.continuing import continued
from flexpiped.engine_boot import BringIntoLine, EngineBoot, Meter, as_it_is, unmeasured
from flexpiped.flight import Flight, Flights
from flexpiped.supervision import (
    INITIAL,
    SHUTTING_DOWN,
    CloseAsked,
    Died,
    Event,
    SleepAsked,
    Started,
    Succeeded,
    SuccessorLost,
    Supervision,
    SupervisorState,
    WakeAsked,
    step,
)
from planner.layout import Pipeline

EngineFactory = Callable[[Pipeline, int], Engine]  # not started yet; called per start with pipeline and epoch


def _ignore(_news: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Succession:
    """A second instance that is not in force, and the word whether it came to be: an engine that dies waits for it."""

    second: Engine
    factory: EngineFactory  # of its kind
    came_about: "asyncio.Future[bool]"


class Supervisor:
    """One engine for as long as the daemon lives, through any number of engine processes.

    Args:
        factory: Makes an engine for a pipeline and its epoch: ``pipeline`` and 0 at first, after a death those in force
            before it. A second instance of another kind brings its own.
        wait_deadline_s: So long a request waits for an engine that starts, wakes up or recovers; None: for ever.
        on_change: Told each new state with its reason (for log, events and readiness).
        on_progress: Told what a starting engine says.
        flights: The requests under way; those of several replicas are kept together.
        meter: Makes the scope in which an engine starts, to measure how long that takes; what the scope gives is called
            when it has started and is tried out.
        bring_into_line: Awaited after each start; one that takes a dead one's place need not have all.
    """

    def __init__(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        policy: RestartPolicy = RestartPolicy(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        wait_deadline_s: float | None = None,
        on_change: Callable[[Supervision], None] = _ignore,
        on_progress: Callable[[str], None] = _ignore,
        flights: Flights | None = None,
        meter: Meter = unmeasured,
        bring_into_line: BringIntoLine = as_it_is,
    ) -> None:
        self._boot = EngineBoot(meter=meter, bring_into_line=bring_into_line)
        self._factory = factory
        self._pipeline = pipeline
        self._epoch = 0
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self.wait_deadline_s = wait_deadline_s
        self._on_change = on_change
        self._on_progress = on_progress
        self._supervision = INITIAL
        self._changed = asyncio.Event()  # replaced at every change of state
        self._engine: Engine | None = None  # None while there is none that serves
        self._capabilities: EngineCapabilities | None = None
        self._watching: asyncio.Task[None] | None = None
        self.flights = Flights() if flights is None else flights
        self._succession: _Succession | None = None
        self._ending: list[Engine] = []  # not in force any more
        self._wake = asyncio.Event()  # replaced at every sleep

    @property
    def supervision(self) -> Supervision:
        return self._supervision

    @property
    def engine(self) -> Engine | None:
        """The engine that serves now, None while there is none. Use ``ready_engine`` to wait for one."""
        return self._engine

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engine that serves now, as one of one."""
        return () if self._engine is None else (self._engine,)

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """Those of the engine that serves, or of the last that did; None before the first."""
        return self._capabilities if self._engine is None else self._engine.capabilities

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline in force, or while there is no engine the one to start with."""
        return self._pipeline if self._engine is None else self._engine.pipeline

    @property
    def epoch(self) -> int:
        """Number of the layout in force."""
        return self._epoch if self._engine is None else self._engine.epoch

    async def start(self) -> None:
        """Return when the engine serves, tried out where it compiles at first use. One that fails is not tried again.

        Raises:
            EngineStartFailed, UnsupportedByEngine
            EngineError: It does not serve what it is tried out with.
        """
        engine = self._factory(self._pipeline, self._epoch)
        try:
            await self._boot.start(engine, self._on_progress, is_first=True)
        except BaseException:
            await engine.close()
            raise
        self._adopt(engine)
        self._watching = asyncio.create_task(self._watch(engine), name="supervisor")

    async def close(self, reason: str = SHUTTING_DOWN) -> None:
        """End all engines; requests in flight end with ``EngineClosed``. Idempotent."""
        self._apply(CloseAsked(reason=reason))
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])  # one that ended by an error keeps nothing from being closed
        await self.discard_second(reason)
        engine, self._engine = self._engine, None
        for each in (engine, *self._ending):
            if each is not None:
                await each.close()

    @property
    def is_asleep(self) -> bool:
        """Whether the engine has ended because nobody used it."""
        return self._supervision.state is SupervisorState.ASLEEP

    def is_in_force(self, engine: Engine) -> bool:
        """Whether an engine takes requests."""
        return engine is self._engine

    async def ready_engine(self, *, other_than: Engine | None = None) -> Engine:
        """Return the engine that serves, waiting for it where need be, and waking it where it sleeps.

        Raises:
            EngineDied: The engine has failed for good, or does not serve within the time that a request may wait.
            EngineClosed: The supervisor is closing.
        """
        try:
            async with asyncio.timeout(self.wait_deadline_s):
                return await self._ready_engine(other_than)
        except TimeoutError:
            reason = f"no engine has served within {self.wait_deadline_s:g} s: {self._supervision.reason}"
            raise EngineDied(reason) from None

    async def _ready_engine(self, other_than: Engine | None) -> Engine:
        while True:
            match self._supervision.state:
                case SupervisorState.READY if self._engine is not None and self._engine is not other_than:
                    return self._engine
                case SupervisorState.FAILED:
                    raise EngineDied(self._supervision.reason)
                case SupervisorState.CLOSING:
                    raise EngineClosed(self._supervision.reason)
                case SupervisorState.ASLEEP:
                    self.wake()
            await self._changed.wait()

    def wake(self) -> None:
        """Start the engine again if it sleeps; ``ready_engine`` does so by itself."""
        self._wake.set()

    def sleep(self, reason: str) -> bool:
        """End the engine until the next request, which waits for it. False where it is in use, and nothing happens.

        A request that only the engine's own server knows, and that comes at this very moment, is asked again.
        """
        engine = self._engine
        if engine is None or self._watching is None or self._succession is not None or len(self.flights):
            return False
        self._pipeline, self._epoch = engine.pipeline, engine.epoch
        self._capabilities = engine.capabilities
        self._engine, self._wake = None, asyncio.Event()
        self._watching.cancel()  # it waits for the death of the engine, and does nothing else
        self._ending.append(engine)
        self._apply(SleepAsked(reason=reason))
        self._watching = asyncio.create_task(self._sleep_until_asked(engine), name="supervisor")
        return True

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt as ``Engine.generate`` does, over deaths of the engine. Close it to abort.

        Raises:
            InvalidRequest: Before the first chunk.
            EngineDied: The engine has failed for good, or keeps dying over this request.
            EngineClosed: The supervisor is closing.
        """
        return continued(request, flights=self.flights, find=self._find)

    async def _find(self, _request: GenerationRequest, _flight: Flight, *, other_than: Engine | None) -> Engine:
        return await self.ready_engine(other_than=other_than)

    # --- a second instance ---

    async def start_second(
        self, pipeline: Pipeline, *, on_progress: Callable[[str], None], factory: EngineFactory | None = None
    ) -> None:
        """Start a second instance beside the engine, and try it out. Clients' requests come with ``switch_over``.

        ``factory`` makes one of another kind, which is then the kind that is started again after a death.

        Raises:
            EngineError: It did not start, or could not go on with the requests of the first.
        """
        if self._engine is None or self._capabilities is None:
            raise EngineDied(f"no engine serves now: {self._supervision.reason}")
        assert self._succession is None, "one at a time"
        factory = factory or self._factory
        second = factory(pipeline, self._engine.epoch + 1)
        self._succession = _Succession(second, factory, asyncio.get_running_loop().create_future())
        await self._boot.start_second(second, on_progress, beside=self._known_capabilities)

    def _known_capabilities(self) -> EngineCapabilities:
        assert self._capabilities is not None, "an engine has served"
        return self._capabilities

    def switch_over(self) -> Engine | None:
        """Put the second instance in force, at once. Return the first, None when it has died meanwhile.

        Raises:
            EngineError: There is nothing to take over any more.
        """
        succession, first = self._succession, self._engine
        if self._supervision.state not in (SupervisorState.READY, SupervisorState.RECOVERING):
            raise EngineDied(self._supervision.reason)
        assert succession is not None, "start_second comes first"
        second, self._succession = succession.second, None
        self._factory = succession.factory
        self._engine, self._capabilities = second, second.capabilities
        if first is None:  # `_watch` waits for this word
            succession.came_about.set_result(True)
        elif self._watching is not None:
            self._watching.cancel()  # it waits for the death of the first, and does nothing else
            self._watching = asyncio.create_task(self._watch(second), name="supervisor")
            self._ending.append(first)
        self._apply(Succeeded(epoch=second.epoch))
        return first

    async def discard_second(self, reason: str) -> None:
        """End the second instance before ``switch_over``, however far it got; the first is as it was. Idempotent."""
        succession, self._succession = self._succession, None
        if succession is None:
            return
        try:
            await succession.second.close()  # before the first is started again: they may share devices
        finally:
            if self._supervision.state is SupervisorState.RECOVERING:
                self._apply(SuccessorLost(reason=reason))
            succession.came_about.set_result(False)

    async def end_first(self, first: Engine) -> None:
        """Close an engine that ``switch_over`` has replaced. Idempotent."""
        await first.close()
        if first in self._ending:
            self._ending.remove(first)

    # --- inside ---

    def _apply(self, event: Event) -> Restart | None:
        self._supervision, decision = step(self._supervision, event, now_s=self._clock(), policy=self._policy)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._on_change(self._supervision)
        return decision if isinstance(decision, Restart) else None

    def _adopt(self, engine: Engine) -> None:
        self._engine = engine
        self._capabilities = engine.capabilities
        self._apply(Started())

    async def _watch(self, engine: Engine) -> None:
        """Replace the engine each time it dies, until that is hopeless."""
        while True:
            reason = await engine.died()
            self._pipeline, self._epoch = engine.pipeline, engine.epoch
            self._capabilities = engine.capabilities
            self._engine, succession = None, self._succession
            restart = self._apply(Died(reason=reason, has_successor=succession is not None))
            await engine.close()
            replacement = await self._replacement(restart, succession)
            if replacement is None:
                return
            engine = replacement

    async def _sleep_until_asked(self, engine: Engine) -> None:
        """Close the engine, which must be over before another one takes its devices; start that when it is wanted."""
        await self.end_first(engine)
        await self._wake.wait()
        self._apply(WakeAsked())
        woken = await self._replacement(Restart(after_s=0.0), None)
        if woken is not None:
            await self._watch(woken)

    async def _replacement(self, restart: Restart | None, succession: _Succession | None) -> Engine | None:
        """Return the second instance that takes over, or start an engine with the pipeline in force before the death.

        None: it was given up.
        """
        if restart is not None and succession is not None and await asyncio.shield(succession.came_about):
            return succession.second
        while restart is not None:
            await self._sleep(restart.after_s)
            engine = self._factory(self._pipeline, self._epoch)
            try:
                await self._boot.start(engine, self._on_progress, is_first=False)
            except EngineError as failure:
                await engine.close()
                restart = self._apply(Died(reason=str(failure)))
                continue
            except BaseException:
                await engine.close()
                raise
            self._adopt(engine)
            return engine
        return None
