"""Owns the engine: starts it, starts it again when it dies, and carries requests over token-exactly."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from engines.closing import closing
from engines.errors import EngineClosed, EngineDied, EngineError
from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from engines.restarts import Restart, RestartPolicy
from flexpiped.supervision import (
    FRUITLESS_DEATHS,
    INITIAL,
    CloseAsked,
    Died,
    Event,
    Started,
    Supervision,
    SupervisorState,
    finish_of,
    step,
)
from planner.layout import Pipeline

EngineFactory = Callable[[Pipeline, int], Engine]  # not started yet; called per start with pipeline and epoch


def _ignore_change(_supervision: Supervision) -> None:
    pass


def _ignore_progress(_message: str) -> None:
    pass


class Supervisor:
    """One engine for as long as the daemon lives, through any number of engine processes.

    Args:
        factory: Makes an engine for a pipeline and its epoch: ``pipeline`` and 0 at first, after a death those in force
            before it.
        on_change: Told each new state with its reason (for log, events and readiness).
        on_progress: Told what a starting engine says.
    """

    def __init__(
        self,
        *,
        factory: EngineFactory,
        pipeline: Pipeline,
        policy: RestartPolicy = RestartPolicy(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        on_change: Callable[[Supervision], None] = _ignore_change,
        on_progress: Callable[[str], None] = _ignore_progress,
    ) -> None:
        self._factory = factory
        self._pipeline = pipeline
        self._epoch = 0
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self._on_change = on_change
        self._on_progress = on_progress
        self._supervision = INITIAL
        self._changed = asyncio.Event()  # replaced at every change of state
        self._engine: Engine | None = None  # None while there is none that serves
        self._capabilities: EngineCapabilities | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def supervision(self) -> Supervision:
        return self._supervision

    @property
    def engine(self) -> Engine | None:
        """The engine that serves now, None while there is none. Use ``ready_engine`` to wait for one."""
        return self._engine

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """Those of the last engine that served; None before the first."""
        return self._capabilities

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline in force, or while there is no engine the one to start with."""
        return self._pipeline if self._engine is None else self._engine.pipeline

    async def start(self) -> None:
        """Return when the engine serves. A first start that fails is not tried again.

        Raises:
            EngineStartFailed, UnsupportedByEngine
        """
        engine = self._factory(self._pipeline, self._epoch)
        try:
            await engine.start(on_progress=self._on_progress)
        except BaseException:
            await engine.close()
            raise
        self._adopt(engine)
        self._watching = asyncio.create_task(self._watch(engine), name="supervisor")

    async def close(self) -> None:
        """End the engine; requests in flight end with ``EngineClosed``. Idempotent."""
        self._apply(CloseAsked())
        if self._watching is not None:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.close()

    async def ready_engine(self, *, other_than: Engine | None = None) -> Engine:
        """Return the engine that serves, waiting for it where need be.

        Raises:
            EngineDied: The engine has failed for good.
            EngineClosed: The supervisor is closing.
        """
        while True:
            match self._supervision.state:
                case SupervisorState.READY if self._engine is not None and self._engine is not other_than:
                    return self._engine
                case SupervisorState.FAILED:
                    raise EngineDied(self._supervision.reason)
                case SupervisorState.CLOSING:
                    raise EngineClosed(self._supervision.reason)
                case _:
                    await self._changed.wait()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt as ``Engine.generate`` does, over deaths of the engine. Close it to abort.

        Raises:
            InvalidRequest: Before the first chunk.
            EngineDied: The engine has failed for good, or keeps dying over this request.
            EngineClosed: The supervisor is closing.
        """
        generated = list(request.generated_token_ids)
        engine: Engine | None = None
        fruitless_deaths = 0
        while fruitless_deaths < FRUITLESS_DEATHS:
            engine = await self.ready_engine(other_than=engine)
            finish = finish_of(request, generated, engine.capabilities)
            if finish is not None:
                yield TokenChunk(token_ids=(), finish_reason=finish)
                return
            resumed = replace(request, generated_token_ids=tuple(generated))
            try:
                async with closing(engine.generate(resumed)) as chunks:
                    async for chunk in chunks:
                        generated.extend(chunk.token_ids)
                        fruitless_deaths = 0
                        yield chunk
                        if chunk.finish_reason is not None:
                            return
                raise EngineError("the engine ended a request without a reason")
            except EngineDied:
                fruitless_deaths += 1
        raise EngineDied(f"the engine died {fruitless_deaths} times in a row over this request")

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
            self._engine = None
            restart = self._apply(Died(reason=reason))
            await engine.close()
            replacement = await self._replacement(restart)
            if replacement is None:
                return
            engine = replacement

    async def _replacement(self, restart: Restart | None) -> Engine | None:
        """Start another engine with the pipeline in force before the death; None when it was given up."""
        while restart is not None:
            await self._sleep(restart.after_s)
            engine = self._factory(self._pipeline, self._epoch)
            try:
                await engine.start(on_progress=self._on_progress)
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
