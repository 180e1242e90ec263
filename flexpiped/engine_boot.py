"""Boots one engine, whatever for: measured, brought into line with those that serve, tried out where that is due."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from engines.errors import EngineStartFailed
from engines.protocol import Engine, EngineCapabilities
from flexpiped.supervision import loss_of
from flexpiped.warming import warm_up


class BringIntoLine(Protocol):
    """Gives an engine that has just started what the others were given since they did."""

    async def __call__(self, engine: Engine, /, *, must: bool) -> None:
        """Return when it may serve; ``must``: it may not without all of it.

        Raises:
            EngineError: It cannot have it, or has ended.
        """


# Makes the scope in which an engine starts; what that gives is called when it has started and is tried out.
Meter = Callable[[Engine], AbstractAsyncContextManager[Callable[[], None]]]


def unmeasured(_engine: Engine) -> AbstractAsyncContextManager[Callable[[], None]]:
    """For whom starts are not measured."""
    return nullcontext(lambda: None)


async def as_it_is(_engine: Engine, *, must: bool) -> None:
    """For whom engines are given nothing after their start."""


class EngineBoot:
    """Used by whoever owns the engine, and closes it when it does not start."""

    def __init__(self, *, meter: Meter, bring_into_line: BringIntoLine) -> None:
        self._meter = meter
        self._bring_into_line = bring_into_line

    async def start(self, engine: Engine, on_progress: Callable[[str], None], *, is_first: bool) -> None:
        """Start an engine. One that compiles at first use is tried out at a first start: nobody waits yet."""
        async with self._meter(engine) as started:
            await engine.start(on_progress=on_progress)
            await self._bring_into_line(engine, must=is_first)
            if is_first and engine.capabilities.compiles_at_first_use:
                started()
                on_progress("trying the engine out: what first requests need is compiled")
                await warm_up(engine)

    async def start_second(
        self, second: Engine, on_progress: Callable[[str], None], *, beside: Callable[[], EngineCapabilities]
    ) -> None:
        """Start a second instance beside one that serves and can what ``beside`` says, and try it out.

        Raises:
            EngineError: It did not start, or could not go on with the requests of the first.
        """
        async with self._meter(second) as started:
            await second.start(on_progress=on_progress)
            await self._bring_into_line(second, must=True)
            loss = loss_of(beside(), second.capabilities)
            if loss is not None:
                raise EngineStartFailed(loss)
            started()
            await warm_up(second)
