"""The loop that carries a handover out, whatever the engine: events in, effects out.

``planner.handover`` decides the steps; an engine says how each is performed, by subclassing ``HandoverLoop``. Every
effect is a coroutine that ends by telling an event. Work that fails tells so; the state machine decides what that
means. One effect is performed at a time: what an earlier one began is stopped first.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import assert_never

from engines.failpoints import FailpointHit
from engines.protocol import RefactorProgress
from planner import handover_events as e
from planner.handover import Handover, HandoverLimits, describe, new_handover, step
from planner.layout import Pipeline


class WorkFailed(Exception):
    """A piece of the handover did not work out; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverResult:
    """How it ended. ``state.phase`` is DONE or ABORTED."""

    state: Handover
    progress: RefactorProgress


class HandoverLoop(ABC):
    """One handover to ``target``.

    Args:
        on_progress: Told after each event and whenever there is news.
    """

    def __init__(
        self,
        target: Pipeline,
        *,
        limits: HandoverLimits,
        weights_total_bytes: int,
        on_progress: Callable[[RefactorProgress], None],
    ) -> None:
        self.target = target
        self.state = new_handover(now_s=time.monotonic(), limits=limits)
        self._on_progress = on_progress
        self._events: asyncio.Queue[e.Event] = asyncio.Queue()
        self._work: asyncio.Task[None] | None = None
        self._is_final = False  # the commit has been sent and cannot be called back
        self._progress = RefactorProgress(
            phase=self.state.phase, message="", elapsed_s=0.0, weights_total_bytes=weights_total_bytes
        )

    # --- how an engine performs the effects ---

    @abstractmethod
    async def prepare(self) -> None:
        """Have the target devices load weights and reserve KV memory; tell Prepared."""

    @abstractmethod
    async def copy_round(self) -> None:
        """Copy what was written since the last round; tell RoundSent."""

    @abstractmethod
    async def commit(self) -> None:
        """Drain, copy the remainder and switch; call ``committed``."""

    @abstractmethod
    async def retire(self) -> None:
        """Free what the old layout held; tell Retired."""

    @abstractmethod
    async def roll_back(self) -> None:
        """Free what was prepared; tell RolledBack."""

    @abstractmethod
    def news(self, progress: RefactorProgress) -> RefactorProgress:
        """Return the progress with what only the engine knows."""

    # --- for whoever owns the loop ---

    async def run(self) -> HandoverResult:
        """Perform the handover to its end."""
        self._apply(e.Started())
        while not self.state.finished:
            self._apply(await self._next_event())
        self._stop_work()
        self.report()
        return HandoverResult(state=self.state, progress=self._progress)

    def tell(self, event: e.Event) -> None:
        """Something has happened."""
        self._events.put_nowait(event)

    def cancel(self) -> bool:
        """Ask to roll back; False past the point where that can be."""
        if self._is_final or not self.state.cancellable:
            return False
        self.tell(e.Cancelled())
        return True

    def describe(self) -> str:
        """Return where it stands, in words."""
        return f"to {self.target.granularity} stages, {describe(self.state)}"

    # --- for the engine's side ---

    @property
    def has_events(self) -> bool:
        """Whether something came in that the state machine has not seen: look before what cannot be called back."""
        return not self._events.empty()

    def make_final(self) -> None:
        """From now on neither a cancellation nor a deadline ends the commit: its own end does."""
        self._is_final = True

    def committed(self, **figures: float | int | None) -> None:
        """Pass the commit point at once, not through the queue; the effect it asks for (retire) comes next."""
        self._is_final = False
        self._progress = replace(self._progress, **figures)  # type: ignore[arg-type]
        self.state, _ = step(self.state, e.Committed(), now_s=time.monotonic())
        asyncio.get_running_loop().call_soon(self._start_retire)

    def note(self, **figures: float | int | None) -> None:
        """Add figures to the progress and report it."""
        self._progress = replace(self._progress, **figures)  # type: ignore[arg-type]
        self.report()

    def report(self) -> None:
        """Tell how it stands."""
        state = self.state
        self._progress = self.news(
            replace(
                self._progress,
                phase=state.phase,
                message=describe(state),
                elapsed_s=time.monotonic() - state.started_s,
                kv_round=len(state.rounds),
                kv_bytes=state.kv_bytes,
                kv_round_bytes=tuple(sent.sent_bytes for sent in state.rounds),
            )
        )
        self._on_progress(self._progress)

    # --- inside ---

    async def _next_event(self) -> e.Event:
        deadline = None if self._is_final else self.state.phase_deadline_s
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(timeout):  # not wait_for, in whose task an event is neither here nor applied yet
                return await self._events.get()
        except TimeoutError:
            return e.Tick()

    def _apply(self, event: e.Event) -> None:
        if self._is_final and isinstance(event, e.Tick):
            return  # the deadline that was waited for does not count any more
        self.state, effects = step(self.state, event, now_s=time.monotonic())
        self.report()
        for effect in effects:
            match effect:
                case e.Prepare():
                    self._start(self.prepare())
                case e.CopyRound():
                    self._start(self.copy_round())
                case e.Commit():
                    self._start(self.commit())
                case e.Retire():
                    self._start(self.retire())
                case e.RollBack():
                    self._is_final = False
                    self._start(self.roll_back())
                case e.Recover():
                    pass  # who owns the loop has begun to recover in the new layout
                case _:
                    assert_never(effect)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._stop_work()
        self._work = asyncio.get_running_loop().create_task(self._guard(work))

    def _start_retire(self) -> None:
        self._work = asyncio.get_running_loop().create_task(self._guard(self.retire()))

    def _stop_work(self) -> None:
        if self._work is not None and self._work is not asyncio.current_task():
            self._work.cancel()

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except (WorkFailed, FailpointHit) as error:
            self.tell(e.Failed(str(error)))
