"""Several streams as one."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

from engines.closing import closing

T = TypeVar("T")


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """Yield what comes of any of ``streams``, until all have ended. Closing it closes all of them.

    Raises:
        Exception: The first error of any of them, when the others have been closed.
    """
    news: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()

    async def pass_on(stream: AsyncIterator[T]) -> None:
        async with closing(stream) as items:
            async for item in items:
                news.put_nowait(item)

    tasks = [asyncio.create_task(pass_on(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(news.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await news.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
