"""Work beside the service: its failure is told, and it ends with the scope."""

import asyncio
from contextlib import AsyncExitStack

from structlog.testing import capture_logs

from flexpiped.background import run_beside


async def fail() -> None:
    raise ValueError("no such device")


async def test_a_failure_is_in_the_log_and_told_at_once() -> None:
    told: list[str] = []
    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            run_beside(stack, fail(), name="auto", on_failure=told.append)
            await asyncio.sleep(0.01)
            assert told == ["auto ended by an error: ValueError: no such device"]

    assert [(entry["event"], entry["log_level"], entry["task"]) for entry in logs] == [
        ("background task failed", "error", "auto")
    ]
    assert isinstance(logs[0]["exc_info"], ValueError)


async def test_what_returns_or_ends_with_the_scope_tells_nothing() -> None:
    told: list[str] = []
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with capture_logs() as logs:
        async with AsyncExitStack() as stack:
            run_beside(stack, asyncio.sleep(0.01), name="short", on_failure=told.append)
            run_beside(stack, work(), name="long", on_failure=told.append)
            await asyncio.sleep(0.02)

    assert ended.is_set()
    assert (told, logs) == ([], [])
