"""The ring of events and its followers."""

import asyncio

from flexpiped.events import Event, EventKind, EventLog


def filled(count: int, *, capacity: int = 10) -> EventLog:
    log = EventLog(capacity=capacity, wall_clock=lambda: 12.5)
    for number in range(1, count + 1):
        log.publish(EventKind.DAEMON, f"event {number}", number=number)
    return log


async def read(log: EventLog, *, since: int, count: int) -> list[Event]:
    follower = log.follow(since=since)
    return [await anext(follower) for _ in range(count)]


def test_events_are_numbered_from_one() -> None:
    log = filled(2)

    assert [event.sequence for event in log.since(0)] == [1, 2]
    assert log.last_sequence == 2
    assert log.since(1)[0].to_wire() == {
        "sequence": 2,
        "time_unix_s": 12.5,
        "kind": "daemon",
        "message": "event 2",
        "fields": {"number": 2},
    }


def test_only_the_last_are_kept_and_what_is_gone_is_said() -> None:
    notice, *kept = filled(5, capacity=3).since(1)

    assert (notice.kind, notice.fields["missed"], notice.sequence) == (EventKind.MISSED, 1, 2)
    assert [event.sequence for event in kept] == [3, 4, 5]


def test_a_follower_from_the_future_gets_nothing() -> None:
    assert filled(2).since(7) == ()


async def test_a_follower_gets_what_was_and_what_comes() -> None:
    log = filled(2)
    reading = asyncio.create_task(read(log, since=1, count=3))
    await asyncio.sleep(0)
    log.publish(EventKind.ENGINE, "event 3")
    log.publish(EventKind.ENGINE, "event 4")

    assert [event.message for event in await reading] == ["event 2", "event 3", "event 4"]


async def test_a_slow_follower_is_told_what_it_missed_and_goes_on() -> None:
    log = filled(1, capacity=3)
    follower = log.follow(since=0)
    assert (await anext(follower)).sequence == 1
    for number in range(2, 7):
        log.publish(EventKind.DAEMON, f"event {number}")

    assert [(await anext(follower)).sequence for _ in range(4)] == [3, 4, 5, 6]


async def test_followers_do_not_disturb_each_other() -> None:
    log = filled(1)
    readers = [asyncio.create_task(read(log, since=0, count=2)) for _ in range(3)]
    await asyncio.sleep(0)
    log.publish(EventKind.DAEMON, "event 2")

    assert [len(events) for events in await asyncio.gather(*readers)] == [2, 2, 2]


async def test_closing_ends_followers_after_the_last_event() -> None:
    log = filled(1)

    async def drain() -> list[str]:
        return [event.message async for event in log.follow(since=0)]

    reading = asyncio.create_task(drain())
    await asyncio.sleep(0)
    log.publish(EventKind.DAEMON, "stopped")
    log.close()

    assert await reading == ["event 1", "stopped"]
