"""Admission: what does not fit waits or is refused, with a time to come back, and its counters return to zero."""

import asyncio
import math
from dataclasses import replace

import pytest

from flexpiped.admission import Admission, AdmissionLimits, Overloaded, OverloadReason, Releases
from flexpiped.keys import Client
from tests.support.clock import Clock

LIMITS = AdmissionLimits(max_requests_in_flight=2, max_tokens_in_flight=100)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(limits=LIMITS, clock=clock)


def in_flight(admission: Admission) -> tuple[int, int]:
    return admission.requests_in_flight, admission.tokens_in_flight


async def test_a_request_too_many_is_refused(admission: Admission) -> None:
    async with admission.admit(), admission.admit():
        with pytest.raises(Overloaded, match="requests in flight: 2, and at most 2 may be") as caught:
            await admission.admit().__aenter__()
        assert caught.value.reason is OverloadReason.TOO_MANY_REQUESTS
        assert caught.value.retry_after_s == 1
    assert in_flight(admission) == (0, 0)


async def test_a_token_too_many_is_refused(admission: Admission) -> None:
    async with admission.admit() as first, admission.admit() as second:
        await admission.reserve(first, tokens=60)
        with pytest.raises(Overloaded) as caught:
            await admission.reserve(second, tokens=41)
        assert caught.value.reason is OverloadReason.TOO_MANY_TOKENS
        await admission.reserve(second, tokens=40)
        assert in_flight(admission) == (2, 100)
    assert in_flight(admission) == (0, 0)


async def test_one_alone_is_admitted_however_large(admission: Admission) -> None:
    async with admission.admit() as lease:
        await admission.reserve(lease, tokens=1000)
    assert in_flight(admission) == (0, 0)


async def test_a_scope_left_by_an_error_gives_everything_back(admission: Admission) -> None:
    async def fail() -> None:
        async with admission.admit() as lease:
            await admission.reserve(lease, tokens=10)
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert in_flight(admission) == (0, 0)


# --- the line ---

QUEUE = AdmissionLimits(max_requests_in_flight=1, max_tokens_in_flight=100, max_requests_queued=3)


class Visitors:
    """Requests that note when they are let in, and stay until they are told to leave."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.inside: list[str] = []
        self._doors: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def send(self, name: str, *, priority: int = 0, tokens: int = 0, deadline_s: float = math.inf) -> None:
        door = self._doors[name] = asyncio.Event()

        async def visit() -> None:
            client = Client(name=name, priority=priority)
            async with self.admission.admit(client, deadline_s=deadline_s) as lease:
                await self.admission.reserve(lease, tokens=tokens)
                self.inside.append(name)
                await door.wait()

        self.tasks[name] = asyncio.create_task(visit())
        await settle()

    async def leave(self, name: str) -> None:
        self._doors[name].set()
        await self.tasks[name]
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_waits_goes_by_priority_then_by_arrival() -> None:
    visitors = Visitors(Admission(limits=QUEUE))
    await visitors.send("first")
    await visitors.send("second")
    await visitors.send("third")
    await visitors.send("urgent", priority=5)
    assert visitors.admission.requests_queued == 3
    for name in ("first", "urgent", "second", "third"):
        await visitors.leave(name)
    assert visitors.inside == ["first", "urgent", "second", "third"]
    assert in_flight(visitors.admission) == (0, 0)


async def test_the_line_is_bounded() -> None:
    visitors = Visitors(Admission(limits=QUEUE))
    for number in range(4):
        await visitors.send(f"{number}")
    with pytest.raises(Overloaded) as caught:
        await visitors.admission.admit().__aenter__()
    assert caught.value.reason is OverloadReason.TOO_MANY_REQUESTS
    for number in range(4):
        await visitors.leave(f"{number}")


async def test_tokens_are_waited_for_and_nobody_overtakes() -> None:
    limits = AdmissionLimits(max_requests_in_flight=8, max_tokens_in_flight=100, max_requests_queued=8)
    visitors = Visitors(Admission(limits=limits))
    await visitors.send("large", tokens=90)
    await visitors.send("next", tokens=50)
    await visitors.send("small", tokens=5)
    assert visitors.inside == ["large"]
    await visitors.leave("large")
    assert visitors.inside == ["large", "next", "small"]
    assert in_flight(visitors.admission) == (2, 55)
    await visitors.leave("next")
    await visitors.leave("small")
    assert in_flight(visitors.admission) == (0, 0)


@pytest.mark.parametrize(
    ("deadline_s", "reason"), [(0.01, OverloadReason.DEADLINE), (math.inf, OverloadReason.QUEUE_TIMEOUT)]
)
async def test_a_deadline_ends_the_wait(deadline_s: float, reason: OverloadReason) -> None:
    admission = Admission(limits=replace(QUEUE, queue_deadline_s=0.02))
    now_s = asyncio.get_running_loop().time()
    async with admission.admit():
        with pytest.raises(Overloaded, match="waited") as caught:
            await admission.admit(deadline_s=now_s + deadline_s).__aenter__()
    assert caught.value.reason is reason
    assert (in_flight(admission), admission.requests_queued) == ((0, 0), 0)


async def test_who_leaves_the_line_gives_everything_back() -> None:
    visitors = Visitors(Admission(limits=QUEUE))
    await visitors.send("first")
    await visitors.send("second")
    await visitors.send("third")
    visitors.tasks["second"].cancel()
    visitors._doors["first"].set()
    await settle()
    assert visitors.inside == ["first", "third"]
    await visitors.leave("third")
    assert (in_flight(visitors.admission), visitors.admission.requests_queued) == ((0, 0), 0)


async def test_leaving_in_the_turn_in_which_the_place_was_given_gives_it_back() -> None:
    visitors = Visitors(Admission(limits=QUEUE))
    await visitors.send("first")
    await visitors.send("second")
    visitors._doors["first"].set()
    await asyncio.wait([visitors.tasks["first"]])
    visitors.tasks["second"].cancel()
    await settle()
    assert (in_flight(visitors.admission), visitors.admission.requests_queued) == ((0, 0), 0)


async def test_larger_limits_let_those_in_who_wait() -> None:
    visitors = Visitors(Admission(limits=QUEUE))
    await visitors.send("first")
    await visitors.send("second")
    visitors.admission.limits = replace(QUEUE, max_requests_in_flight=2)
    await settle()
    assert visitors.inside == ["first", "second"]
    await visitors.leave("first")
    await visitors.leave("second")


# --- limits of a key ---


async def test_a_key_has_so_many_requests_in_flight(admission: Admission) -> None:
    alice, bob = Client(name="alice", max_requests_in_flight=1), Client(name="bob", max_requests_in_flight=1)
    async with admission.admit(alice), admission.admit(bob):
        with pytest.raises(Overloaded, match="requests of this key in flight: 1,") as caught:
            await admission.admit(alice).__aenter__()
        assert caught.value.reason is OverloadReason.KEY_CONCURRENCY
        assert admission.in_flight_of(alice) == 1
    assert (admission.in_flight_of(alice), admission.in_flight_of(bob)) == (0, 0)


async def test_a_key_begins_so_many_requests_a_minute(admission: Admission, clock: Clock) -> None:
    alice = Client(name="alice", requests_per_minute=2.0)
    for _ in range(2):
        async with admission.admit(alice):
            pass
    with pytest.raises(Overloaded, match="2 requests a minute") as caught:
        await admission.admit(alice).__aenter__()
    assert (caught.value.reason, caught.value.retry_after_s) == (OverloadReason.KEY_RATE, 30)
    clock.now_s += 30.0
    async with admission.admit(alice):
        pass


def test_retry_after_follows_the_rate_at_which_work_ends(clock: Clock) -> None:
    releases = Releases(clock=clock, window_s=30.0)
    assert releases.seconds_until(requests=1) == 1
    for _ in range(3):
        releases.add(100)
    assert releases.seconds_until(requests=1) == 10  # 3 in 30 s
    assert releases.seconds_until(tokens=50) == 5
    assert releases.seconds_until(tokens=10_000) == 60
    clock.now_s = 31.0
    assert releases.seconds_until(requests=1) == 1  # nothing known any more
