"""When a client counts as one that has stopped reading."""

import asyncio
import math

from structlog.testing import capture_logs

from flexpiped.connections import SendWatch

DEADLINE_S = 60.0


class Waiting(asyncio.Transport):
    """A transport on which so many bytes wait."""

    def __init__(self, waiting_bytes: int) -> None:
        super().__init__()
        self.waiting_bytes = waiting_bytes
        self.is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.waiting_bytes

    def abort(self) -> None:
        self.is_aborted = True


def watched(transport: Waiting, *, deadline_s: float = DEADLINE_S) -> SendWatch:
    watch = SendWatch(deadline_s)
    watch.begin(transport)
    return watch


async def test_one_that_takes_nothing_for_so_long() -> None:
    transport = Waiting(70_000)
    with capture_logs() as logs:
        watched(transport)
        await asyncio.sleep(DEADLINE_S - 1.0)
        assert not transport.is_aborted
        await asyncio.sleep(2.0)

    assert transport.is_aborted
    assert [(each["event"], each["waiting_bytes"]) for each in logs] == [
        ("client stopped reading, connection closed", 70_000)
    ]


async def test_one_that_reads_however_slowly_is_there() -> None:
    transport = Waiting(70_000)
    watched(transport)
    for _ in range(20):
        await asyncio.sleep(DEADLINE_S - 1.0)
        transport.waiting_bytes -= 1
    assert not transport.is_aborted

    await asyncio.sleep(2 * DEADLINE_S)
    assert transport.is_aborted


async def test_while_the_handler_still_writes_it_is_not_held_up() -> None:
    transport = Waiting(70_000)
    watched(transport)
    for _ in range(3):
        await asyncio.sleep(DEADLINE_S - 1.0)
        transport.waiting_bytes += 20_000
    assert not transport.is_aborted

    await asyncio.sleep(2 * DEADLINE_S)
    assert transport.is_aborted


async def test_one_that_has_caught_up_has_all_the_time_again() -> None:
    transport = Waiting(70_000)
    watch = watched(transport)
    await asyncio.sleep(DEADLINE_S - 1.0)
    watch.end()
    await asyncio.sleep(10 * DEADLINE_S)
    assert not transport.is_aborted

    watch.begin(transport)
    await asyncio.sleep(DEADLINE_S - 1.0)
    assert not transport.is_aborted
    watch.end()
    watch.end()


async def test_without_a_deadline_it_may_take_for_ever() -> None:
    transport = Waiting(70_000)
    watched(transport, deadline_s=math.inf)
    await asyncio.sleep(1000 * DEADLINE_S)
    assert not transport.is_aborted
