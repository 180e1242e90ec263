"""Stage workers that hang: a step is overdue, and they answer nothing. They are killed, and recovered as a crash is."""

import asyncio
import time
from collections.abc import Callable, Sequence

from engines.native.inquiries import Inquiries
from engines.native.workers import WorkerPool

_ANSWER_S = 2.0


async def kill_what_hangs(
    pool: WorkerPool,
    inquiries: Inquiries,
    *,
    oldest_s: Callable[[], float | None],
    workers: Callable[[], Sequence[int]],
    deadline_s: float,
) -> None:
    """Watch for ever.

    Args:
        oldest_s: When the oldest step under way was dispatched; None: there is none, or none to be waited for.
        workers: Those that carry a stage, the first stage first. Where all of them answer, the first one is killed.
    """
    while True:
        await asyncio.sleep(min(deadline_s / 4, 1.0))
        dispatched_s = oldest_s()
        if dispatched_s is None or time.monotonic() - dispatched_s < deadline_s:
            continue
        asked = workers()
        answers = await asyncio.gather(*(inquiries.answers_within(index, _ANSWER_S) for index in asked))
        silent = [index for index, well in zip(asked, answers, strict=True) if not well]
        for index in silent or asked[:1]:
            pool.kill(index)
