"""Ingress processes over their lives, with processes of the test: started again, given up, told, ended."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from engines.restarts import RestartPolicy
from flexpiped.admission import Admission, AdmissionLimits
from flexpiped.api.backends import Backends
from flexpiped.ingress.fleet import Fleet, IngressFailed
from flexpiped.ingress.messages import Down, Drain, Now, Ping, Pong, Serves, Up, Welcome
from flexpiped.keys import KeyRing
from flexpiped.status import Health, ServiceState

NOW = Now(
    models=(),
    are_named=False,
    keys=None,
    tls_certificate=None,
    tls_key=None,
    log_format="json",
    log_level="info",
    reloads=0,
)
BACKENDS = Backends(
    models=dict,
    are_named=lambda: False,
    health=lambda: Health(state=ServiceState.READY, reason=""),
    admission=Admission(limits=AdmissionLimits()),
)


class FakeProcess:
    """Listens once it knows what it is to be, answers pings, and ends when it is told to."""

    def __init__(self, pid: int, on_message: Callable[[Up], None], *, answers: bool = True) -> None:
        self.pid = pid
        self.told: list[Down] = []
        self.answers = answers
        self.is_closed = False
        self._on_message = on_message
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def send(self, message: Down) -> None:
        self.told.append(message)
        loop = asyncio.get_running_loop()
        match message:
            case Now() if self.answers:
                loop.call_soon(self._on_message, Serves(tuple(model.name for model in message.models)))
            case Ping() if self.answers:
                loop.call_soon(self._on_message, Pong())
            case Drain() if self.answers:
                self.end("it ended with status 0")
            case _:
                pass

    def end(self, how: str) -> None:
        if not self._end.done():
            self._end.set_result(how)

    async def ended(self) -> str:
        return await asyncio.shield(self._end)

    async def close(self) -> None:
        self.is_closed = True


class Time:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        waking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now_s + duration_s, waking))
        await waking

    async def passes(self, duration_s: float) -> None:
        """Let everybody who sleeps wake up in turn until then."""
        until_s = self.now_s + duration_s
        await turns()
        while due := sorted((each for each in self._sleepers if each[0] <= until_s), key=lambda each: each[0]):
            self._sleepers.remove(due[0])
            self.now_s, waking = due[0]
            if not waking.done():
                waking.set_result(None)
            await turns()
        self.now_s = until_s


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@dataclass(kw_only=True)
class Rig:
    """A fleet with what it did, and when it started processes."""

    time: Time = field(default_factory=Time)

    answers: bool = True
    fails: bool = False
    now: Now = NOW
    news: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    processes: list[FakeProcess] = field(default_factory=list)
    spawned_s: list[float] = field(default_factory=list)

    async def spawn(self, on_message: Callable[[Up], None]) -> FakeProcess:
        self.spawned_s.append(self.time.now_s)
        if self.fails:
            raise OSError(12, "Cannot allocate memory")
        self.processes.append(FakeProcess(len(self.processes) + 1, on_message, answers=self.answers))
        return self.processes[-1]

    def fleet(self, count: int) -> Fleet:
        return Fleet(
            count,
            backends=BACKENDS,
            welcome=lambda number: Welcome(number, 2, ("127.0.0.1", 1), "/run/x", 30.0, 1024, 60.0, 8192, 75.0, 60.0),
            now=lambda: self.now,
            on_news=self.news.append,
            on_given_up=self.given_up.append,
            spawn=self.spawn,
            policy=RestartPolicy(max_deaths=3, first_delay_s=1.0),
            clock=self.time.clock,
            sleep=self.time.sleep,
        )


@asynccontextmanager
async def started(rig: Rig, count: int = 2) -> AsyncIterator[Fleet]:
    fleet = rig.fleet(count)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close(within_s=0.01)


async def test_each_is_told_what_it_is_before_what_is_now() -> None:
    rig = Rig()
    async with started(rig) as fleet:
        assert fleet.num_listening == 2
        assert [type(message) for message in rig.processes[1].told[:2]] == [Welcome, Now]
        assert isinstance(rig.processes[1].told[0], Welcome)
        assert rig.processes[1].told[0].number == 2
    assert all(isinstance(each.told[-1], Drain) and each.is_closed for each in rig.processes)


async def test_one_that_dies_is_started_again_later_each_time_and_at_last_given_up() -> None:
    rig = Rig()
    async with started(rig) as fleet:
        began_s = rig.spawned_s[0]
        for index in (0, 2):
            rig.processes[index].end("killed by SIGKILL")
            await rig.time.passes(10)
        assert [at - began_s for at in rig.spawned_s[2:]] == [1.0, 12.0]
        assert rig.news[0] == "ingress 1 died (killed by SIGKILL) and is started again in 1 s"
        assert (fleet.num_listening, rig.processes[0].is_closed) == (2, True)

        rig.processes[3].end("it ended with status 1")
        await rig.time.passes(10)
        assert rig.news[-1] == "ingress 1 died 3 times within 300 s, at last: it ended with status 1"
        assert (fleet.num_listening, rig.given_up) == (1, [])
        samples = {
            (sample.name, sample.labels.get("ingress", "")): sample.value
            for family in fleet.families()
            for sample in family.samples
        }
        assert samples["flexpiped_ingress_restarts_total", "1"] == 2.0
        assert samples["flexpiped_ingress_processes", ""] == 1.0


async def test_none_left_is_the_end() -> None:
    rig = Rig()
    async with started(rig, 1):
        for index in range(3):
            rig.processes[index].end("killed by SIGKILL")
            await rig.time.passes(10)
        assert len(rig.given_up) == 1


async def test_none_that_starts_is_a_failed_start() -> None:
    rig = Rig(fails=True)
    fleet = rig.fleet(2)
    starting = asyncio.create_task(fleet.start())
    await rig.time.passes(10)
    with pytest.raises(IngressFailed):
        await starting
    await fleet.close(within_s=1.0)
    assert "it cannot be started: Cannot allocate memory" in rig.news[0]


async def test_one_whose_loop_does_not_turn_is_ended() -> None:
    rig = Rig()
    async with started(rig, 1):
        rig.processes[0].answers = False
        await rig.time.passes(60)
        assert "it has not answered for 30 s" in rig.news[0]
        assert rig.processes[0].is_closed
        assert len(rig.processes) == 2


async def test_what_changes_is_said_once() -> None:
    rig = Rig()
    async with started(rig, 1) as fleet:
        rig.now = msgspec.structs.replace(NOW, keys=KeyRing())
        await rig.time.passes(1)
        fleet.push()
        assert [message for message in rig.processes[0].told if isinstance(message, Now)] == [NOW, rig.now]


async def test_one_that_does_not_end_is_killed() -> None:
    rig = Rig()
    async with started(rig, 1):
        rig.processes[0].answers = False
    assert rig.processes[0].is_closed
