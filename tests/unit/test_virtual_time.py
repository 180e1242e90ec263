"""The loop of unit tests: time jumps where only timers are left, and waits where something can come from outside."""

import asyncio
import sys
import threading
import time
from pathlib import Path

import pytest

HOUR_S = 3600.0


async def test_a_sleep_takes_no_time_and_moves_the_clock() -> None:
    loop, began_s = asyncio.get_running_loop(), time.monotonic()
    before_s = loop.time()
    await asyncio.sleep(HOUR_S)
    assert loop.time() - before_s >= HOUR_S
    assert time.monotonic() - began_s < HOUR_S / 10


async def test_timers_come_in_their_order() -> None:
    told: list[int] = []

    async def later(number: int) -> None:
        await asyncio.sleep(number * HOUR_S)
        told.append(number)

    await asyncio.gather(*(later(number) for number in (3, 1, 2)))
    assert told == [1, 2, 3]


async def test_what_nobody_brings_times_out_at_once() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(HOUR_S):
            await asyncio.Event().wait()


async def test_a_thread_is_waited_for() -> None:
    may_end = threading.Event()
    working = asyncio.create_task(asyncio.to_thread(may_end.wait))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(may_end.set)
    async with asyncio.timeout(HOUR_S):
        assert await working


async def test_a_socket_is_waited_for(tmp_path: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.close()

    async with await asyncio.start_unix_server(answer, tmp_path / "socket"):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        async with asyncio.timeout(HOUR_S):
            writer.write(b"there\n")
            assert await reader.readline() == b"there\n"
        writer.close()
        await writer.wait_closed()


async def test_a_process_is_waited_for() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "raise SystemExit(3)")
    async with asyncio.timeout(HOUR_S):
        assert await process.wait() == 3


@pytest.mark.real_loop
async def test_a_test_that_is_marked_has_real_time() -> None:
    began_s = time.monotonic()
    await asyncio.sleep(0.01)
    assert time.monotonic() - began_s >= 0.005
