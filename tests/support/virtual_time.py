"""An event loop whose clock jumps to the next timer where nothing else can happen: no test waits, none races a clock.

It waits really as soon as something can come from outside: a file descriptor is watched, a thread of its pool works, or
it has started a process. Nothing tells it of other threads, so tests with such ones are marked ``real_loop``.
"""

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, Final

_OWN_DESCRIPTORS: Final = 1  # by which other threads wake it


class _Selector(selectors.DefaultSelector):
    """Asks the loop before it waits."""

    loop: "VirtualTimeLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0 or self.loop.hears_of_others:
            return super().select(timeout)
        events = super().select(0)
        if not events:
            self.loop.jump(timeout)
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The loop of tests that are not marked ``real_loop``."""

    def __init__(self) -> None:
        self._ahead_s = 0.0
        self._working = 0  # threads of the pool
        self._has_processes = False
        self._watched = _Selector()
        self._watched.loop = self
        super().__init__(self._watched)

    def time(self) -> float:
        return super().time() + self._ahead_s

    @property
    def hears_of_others(self) -> bool:
        """Whether something may come that no timer brings."""
        return self._has_processes or self._working > 0 or len(self._watched.get_map()) > _OWN_DESCRIPTORS

    def jump(self, duration_s: float) -> None:
        self._ahead_s += duration_s

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        self._working += 1
        future = super().run_in_executor(executor, func, *args)  # type: ignore[arg-type]
        future.add_done_callback(self._has_worked)
        return future

    def _has_worked(self, _future: asyncio.Future[Any]) -> None:
        self._working -= 1

    async def subprocess_exec(self, *args: Any, **kwargs: Any) -> Any:
        self._has_processes = True
        return await super().subprocess_exec(*args, **kwargs)

    async def subprocess_shell(self, *args: Any, **kwargs: Any) -> Any:
        self._has_processes = True
        return await super().subprocess_shell(*args, **kwargs)
