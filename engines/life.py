"""From the start of an engine to its end: is it alive, and of what did it end?"""

import asyncio
from collections.abc import Callable

from engines.errors import EngineClosed, EngineDied, EngineError


class Life:
    """One engine's. It ends once, but one that has died may still be closed.

    Args:
        on_end: Told each end. Everybody who waits for the engine must learn of it there.
    """

    def __init__(self, *, on_end: Callable[[EngineError], None]) -> None:
        self._on_end = on_end
        self._end: EngineError | None = EngineClosed("the engine has not been started")
        self._death = ""
        self._died = asyncio.Event()

    @property
    def end(self) -> EngineError | None:
        """What it ended of, or that it has not begun; None while it is alive."""
        return self._end

    def begin(self) -> None:
        """Its processes are about to start."""
        self._end = None

    def die(self, reason: str) -> None:
        """It has died. Call it while it is alive."""
        self._death = reason
        self._finish(EngineDied(reason))
        self._died.set()

    def close(self) -> None:
        """It is ended on purpose. Idempotent."""
        if not isinstance(self._end, EngineClosed):
            self._finish(EngineClosed("the engine was closed"))

    async def died(self) -> str:
        """Return why it died, when it has."""
        await self._died.wait()
        return self._death

    def ensure(self) -> None:
        """Raises: EngineDied, EngineClosed: It is not alive."""
        if self._end is not None:
            raise type(self._end)(str(self._end))

    def _finish(self, end: EngineError) -> None:
        self._end = end
        self._on_end(end)
