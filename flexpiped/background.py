"""Work that runs beside the service as long as its scope lasts: kept, told of when it fails, ended with the scope."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack

from flexpiped import log_events


def run_beside(
    stack: AsyncExitStack,
    work: Coroutine[None, None, None],
    *,
    name: str,
    on_failure: Callable[[str], object],
) -> None:
    """Run ``work`` until it returns or ``stack`` ends.

    Args:
        on_failure: Told in words when it ended by an exception, which nobody waits for; it is in the log, too.
    """

    def told(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        log_events.background_task_failed(task=name, error=error)
        on_failure(f"{name} ended by an error: {type(error).__name__}: {error}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(told)
    stack.push_async_callback(_end, task)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
