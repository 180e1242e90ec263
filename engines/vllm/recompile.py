"""After a move, has the ranks that fell back to eager mode run compiled code again.

    begin --compile, rank by rank, in helpers--> predicted? --within the limit--> load between two steps --> COMPILED
                    |                               |                                   |
                    +--failed: EAGER                +--beyond it: EAGER                 +--failed: EAGER

A move or the end of the engine stops it at any time before the load. What a load costs is known before it is done: the
helper has done it once. Where one took longer than the limit all the same, its code is used, for the stall is paid;
but the prediction has been wrong, so from then on that engine stays eager after a move.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engines.served.channel import CallFailed, Channel, ChannelClosed

LOAD_LIMIT_S = 1.0  # steps may stand still for this long
_LOAD_DEADLINE_S = 60.0  # a rank that has not loaded by then is lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompilation:
    """How one ended. ``load_s`` is the longest load of a rank, predicted where it was not done."""

    compiled: bool
    ranks: tuple[int, ...]  # that had fallen back, by global rank
    duration_s: float  # since the move ended; steps ran eagerly that long
    compile_s: float = 0.0  # in helpers, all ranks together
    load_s: float | None = None
    stall_s: float | None = None  # for which steps stood still
    reason: str = ""  # why it stays eager

    @property
    def message(self) -> str:
        """One sentence for people."""
        ranks = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        if not self.compiled:
            return f"{ranks}: stays eager: {self.reason}"
        assert self.stall_s is not None
        return (
            f"{ranks}: compiled again after {self.duration_s:.1f} s ({self.compile_s:.1f} s of it compiling in helper"
            f" processes), load stalled steps for {self.stall_s * 1e3:.0f} ms"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the helper of one rank has done. ``load_s`` is what loading took there, in processor time."""

    compile_s: float
    load_s: float


def why_eager(done: Sequence[Compiled], *, limit_s: float) -> str:
    """Return why this code is not loaded, or nothing. Ranks load at the same time."""
    load_s = max((one.load_s for one in done), default=0.0)
    if load_s > limit_s:
        return f"loading its code would stall steps for {load_s:.1f} s, more than {limit_s:g} s"
    return ""


class Recompiler:
    """One at a time, for one engine.

    Args:
        sides: Side channels by global rank.
        on_end: Told how each one ended that was not stopped.
        on_crash: Told when ranks may disagree about what they run: the engine is replaced.
        deadline_s: For all of the compiling.
    """

    def __init__(
        self,
        core: Channel,
        sides: Mapping[int, Channel],
        *,
        on_end: Callable[[Recompilation], None],
        on_crash: Callable[[str], None],
        deadline_s: float,
        limit_s: float = LOAD_LIMIT_S,
    ) -> None:
        self._core = core
        self._sides = sides
        self._on_end = on_end
        self._on_crash = on_crash
        self._deadline_s = deadline_s
        self._limit_s = limit_s
        self._refusal = ""
        self._task: asyncio.Task[None] | None = None
        self._loading = False

    @property
    def under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    def begin(self, counts: Sequence[int]) -> None:
        """Begin for a layout with ``counts`` layers on each pipeline rank, which is in force."""
        assert not self.under_way, "stop the last one first"
        self._task = asyncio.create_task(self._run(list(counts)), name="vllm-recompile")

    async def resume(self, counts: Sequence[int]) -> None:
        """Begin in an engine whose ranks may have been left in eager mode, or with helpers at work."""
        await self._stop_helpers()
        self.begin(counts)

    async def stop(self) -> None:
        """Return when none is under way. Helpers are ended; a load that has begun is not called back."""
        if self._task is None:
            return
        if not self._loading:
            self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None

    def end(self) -> None:
        """The engine has ended, and its helpers with it."""
        if self._task is not None:
            self._task.cancel()

    async def wait(self) -> None:
        """Return when the one under way has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # --- inside ---

    async def _run(self, counts: list[int]) -> None:
        started_s = time.monotonic()
        try:
            ended = await self._recompile(counts, started_s)
        except ChannelClosed:
            return  # the engine has died, which is told elsewhere
        if ended is not None:
            self._on_end(ended)

    async def _recompile(self, counts: list[int], started_s: float) -> Recompilation | None:
        ranks = await self._eager_ranks()
        if not ranks:
            return None
        done: list[Compiled] = []
        try:
            if self._refusal:
                raise _StaysEager(self._refusal)
            async with asyncio.timeout(self._deadline_s):
                done = await self._compile(ranks, counts)
            if reason := why_eager(done, limit_s=self._limit_s):
                raise _StaysEager(reason)
            loaded = await self._load()
        except (_StaysEager, CallFailed) as error:
            return _ended(ranks, done, started_s, reason=str(error))
        except TimeoutError:
            await self._stop_helpers()
            return _ended(ranks, done, started_s, reason=f"not compiled within {self._deadline_s:g} s")
        if loaded is None:
            return None
        if loaded["stall_s"] > self._limit_s:
            self._refusal = f"loading compiled code has stalled steps for {loaded['stall_s']:.1f} s before"
        return _ended(ranks, done, started_s, loaded=loaded)

    async def _eager_ranks(self) -> tuple[int, ...]:
        answers = {rank: await side.call("status") for rank, side in self._sides.items()}
        return tuple(rank for rank, answer in answers.items() if answer["runs"] == "eager" and answer["layers"])

    async def _compile(self, ranks: Sequence[int], counts: list[int]) -> list[Compiled]:
        try:  # one at a time: all at once would cost the streams more
            answers = [await self._sides[rank].call("compile", counts=counts) for rank in ranks]
        except asyncio.CancelledError:
            await asyncio.shield(self._stop_helpers())
            raise
        return [Compiled(compile_s=one["compile_s"], load_s=one["load_s"]) for one in answers if one]

    async def _stop_helpers(self) -> None:
        try:
            for side in self._sides.values():
                await side.call("stop_compiling")
        except ChannelClosed:
            pass  # they have ended with the engine

    async def _load(self) -> dict[str, float] | None:
        self._loading = True
        try:
            loaded: dict[str, Any] = await self._core.core("load_compiled", _LOAD_DEADLINE_S)
        finally:
            self._loading = False
        if "crash" in loaded:
            self._on_crash(loaded["crash"])
            return None
        return loaded


def _ended(
    ranks: tuple[int, ...],
    done: Sequence[Compiled],
    started_s: float,
    *,
    reason: str = "",
    loaded: Mapping[str, float] | None = None,
) -> Recompilation:
    figures = {"load_s": max((one.load_s for one in done), default=None)} if loaded is None else loaded
    return Recompilation(
        compiled=not reason,
        ranks=ranks,
        duration_s=time.monotonic() - started_s,
        compile_s=sum(one.compile_s for one in done),
        load_s=figures["load_s"],
        stall_s=figures.get("stall_s"),
        reason=reason,
    )


class _StaysEager(Exception):
    """Why."""
