"""One piece of work beside the event loop, on a thread that has room for deep recursion."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

_STACK_BYTES: Final = 512 << 20  # of address space: what is not used takes no memory
T = TypeVar("T")


async def on_deep_stack(work: Callable[[], T]) -> T:
    """Return what ``work`` returns, or raise what it raises. Its thread is a new one, and gives its stack back."""
    executor = ThreadPoolExecutor(max_workers=1)
    before = threading.stack_size(_STACK_BYTES)
    try:
        made = executor.submit(work)  # starts the thread
    finally:
        threading.stack_size(before)
        executor.shutdown(wait=False)
    return await asyncio.wrap_future(made)
