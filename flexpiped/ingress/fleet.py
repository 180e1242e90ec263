"""The ingress processes of a daemon: started together, started again when they die or hang, drained and ended."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engines.restarts import GiveUp, RestartPolicy, after_death
from flexpiped import log_events
from flexpiped.api.backends import Backends
from flexpiped.ingress.child import spawn
from flexpiped.ingress.desk import Desk
from flexpiped.ingress.messages import Down, Drain, Now, Ping, Pong, Serves, Up, Welcome

_PUSH_INTERVAL_S: Final = 0.1
_PING_INTERVAL_S: Final = 2.0
_MOST_UNANSWERED: Final = 15  # pings
_MOST_AT_START: Final = 60  # while it has not listened yet: it loads tokenizers beside others that do
_Sleep = Callable[[float], Awaitable[object]]


class IngressFailed(Exception):
    """No ingress process serves, and none will."""


class Process(Protocol):
    """One life of an ingress process (``flexpiped.ingress.child``)."""

    @property
    def pid(self) -> int: ...

    def send(self, message: Down) -> None: ...

    async def ended(self) -> str:
        """Wait until it has ended, and say how."""

    async def close(self) -> None: ...


Spawn = Callable[[Callable[[Up], None]], Awaitable[Process]]


@dataclass(slots=True, eq=False)
class _Ingress:
    """One of them over all of its lives. ``models`` None: it does not listen."""

    number: int
    process: Process | None = None
    desk: Desk | None = None
    models: tuple[str, ...] | None = None
    unanswered: int = 0  # pings; not by the clock, for it is no fault of its own if the daemon has been held up
    has_given_up: bool = False
    restarts_total: int = 0


class Fleet:
    """Used on one event loop.

    Args:
        welcome: What one of a number is to be.
        now: What changes, as it is now; looked at ten times a second, and whenever ``push`` is called.
        on_news: Told what happens to them, in words.
        on_given_up: Told that none is left.
    """

    def __init__(
        self,
        count: int,
        *,
        backends: Backends,
        welcome: Callable[[int], Welcome],
        now: Callable[[], Now],
        on_news: Callable[[str], object],
        on_given_up: Callable[[str], None],
        spawn: Spawn = spawn,
        policy: RestartPolicy = RestartPolicy(),
        clock: Callable[[], float] = time.monotonic,
        sleep: _Sleep = asyncio.sleep,
    ) -> None:
        self._all = tuple(_Ingress(number=number) for number in range(1, count + 1))
        self._backends = backends
        self._welcome = welcome
        self._now = now
        self._on_news = on_news
        self._on_given_up = on_given_up
        self._spawn = spawn
        self._policy = policy
        self._clock = clock
        self._sleep = sleep
        self._said: Now | None = None
        self._changed = asyncio.Event()  # replaced at every change
        self._keeping: dict[_Ingress, asyncio.Task[None]] = {}
        self._pushing: list[asyncio.Task[None]] = []
        self._is_ending = False

    # --- what it is ---

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that are there now."""
        return tuple(each.process.pid for each in self._all if each.process is not None)

    @property
    def num_listening(self) -> int:
        """How many take connections now."""
        return sum(each.models is not None for each in self._all)

    def families(self) -> Iterator[Metric]:
        """Yield what Prometheus is told of them."""
        yield GaugeMetricFamily(
            "flexpiped_ingress_processes", "Ingress processes that take connections", value=self.num_listening
        )
        restarts = CounterMetricFamily(
            "flexpiped_ingress_restarts", "Ingress processes started again", labels=["ingress"]
        )
        requests = GaugeMetricFamily(
            "flexpiped_ingress_requests", "Admitted requests of an ingress process", labels=["ingress"]
        )
        for each in self._all:
            restarts.add_metric([str(each.number)], each.restarts_total)
            requests.add_metric([str(each.number)], 0 if each.desk is None else each.desk.requests_in_flight)
        yield from (restarts, requests)

    # --- its life ---

    async def start(self) -> None:
        """Return when all of them listen, but those that have been given up.

        Raises:
            IngressFailed: None of them does.
        """
        self._keeping = {
            each: asyncio.create_task(self._keep(each), name=f"ingress-{each.number}") for each in self._all
        }
        self._pushing = [asyncio.create_task(self._push_forever(), name="ingress-news")]
        for task in (*self._keeping.values(), *self._pushing):
            task.add_done_callback(self._tell_mistake)
        await self._until(lambda: all(each.has_given_up or each.models is not None for each in self._all))
        if all(each.has_given_up for each in self._all):
            raise IngressFailed("no ingress process starts; the log has their last words")

    async def until_serving(self, models: frozenset[str], *, within_s: float) -> bool:
        """Wait until every one answers for these models by itself, as the daemon does till then; False: too long."""

        def is_so() -> bool:
            return all(each.has_given_up or models <= frozenset(each.models or ()) for each in self._all)

        try:
            async with asyncio.timeout(within_s):
                await self._until(is_so)
        except TimeoutError:
            return False
        return True

    def push(self) -> None:
        """Tell them what has changed."""
        now = self._now()
        if now != self._said:
            self._said = now
            self._send_all(now)

    async def close(self, *, within_s: float) -> None:
        """Have them take no connection any more and end; those that do not, within a time, are killed. Idempotent."""
        self._is_ending = True
        self._send_all(Drain())
        draining = [task for each, task in self._keeping.items() if each.process is not None]
        if draining:
            await asyncio.wait(draining, timeout=within_s)
        tasks = [*self._keeping.values(), *self._pushing]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- inside ---

    async def _keep(self, ingress: _Ingress) -> None:
        """Have one process after the other, until that is hopeless or the daemon ends."""
        deaths_s: tuple[float, ...] = ()
        while True:
            reason = await self._live(ingress)
            self._tell_change()
            if self._is_ending:
                return
            deaths_s = (*deaths_s[-self._policy.max_deaths :], self._clock())
            decision = after_death(deaths_s, policy=self._policy)
            if isinstance(decision, GiveUp):
                self._give_up(ingress, f"ingress {ingress.number} {decision.reason}, at last: {reason}")
                return
            log_events.ingress_died(number=ingress.number, reason=reason)
            self._on_news(f"ingress {ingress.number} died ({reason}) and is started again in {decision.after_s:g} s")
            await self._sleep(decision.after_s)
            ingress.restarts_total += 1

    async def _live(self, ingress: _Ingress) -> str:
        """Return why it has ended; nothing of it is left then."""
        desk = Desk(self._backends, send=lambda message: process.send(message))
        try:
            process = await self._spawn(lambda message: self._take(ingress, desk, message))
        except OSError as error:
            return f"it cannot be started: {error.strerror}"
        ingress.process, ingress.desk, ingress.unanswered = process, desk, 0
        try:
            self._said = self._now() if self._said is None else self._said
            process.send(self._welcome(ingress.number))
            process.send(self._said)
            return await self._ended(ingress, process)
        finally:
            ingress.process = ingress.desk = ingress.models = None
            await process.close()
            await desk.close()

    async def _ended(self, ingress: _Ingress, process: Process) -> str:
        """Wait for its end, and bring it about where its event loop does not turn any more."""
        watching = [
            asyncio.create_task(work, name=f"ingress-{ingress.number}-watched")
            for work in (process.ended(), self._hangs(ingress, process))
        ]
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in watching:
                task.cancel()

    async def _hangs(self, ingress: _Ingress, process: Process) -> str:
        """Return once its event loop does not turn any more."""
        while ingress.unanswered < (_MOST_AT_START if ingress.models is None else _MOST_UNANSWERED):
            ingress.unanswered += 1
            process.send(Ping())
            await self._sleep(_PING_INTERVAL_S)
        return f"it has not answered for {ingress.unanswered * _PING_INTERVAL_S:g} s"

    def _tell_mistake(self, task: asyncio.Task[None]) -> None:
        """What should go on has ended by an error, which is one of ours."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log_events.background_task_failed(task=task.get_name(), error=error)
            self._on_given_up(f"{task.get_name()} ended by an error: {type(error).__name__}: {error}")

    def _take(self, ingress: _Ingress, desk: Desk, message: Up) -> None:
        match message:
            case Serves(models=models):
                ingress.models = models
                self._tell_change()
            case Pong():
                ingress.unanswered = 0
            case _:
                desk.take(message)

    def _give_up(self, ingress: _Ingress, reason: str) -> None:
        ingress.has_given_up = True
        log_events.ingress_failed(number=ingress.number, reason=reason)
        self._on_news(reason)
        self._tell_change()
        if all(each.has_given_up for each in self._all):
            self._on_given_up(reason)

    async def _push_forever(self) -> None:
        while True:
            self.push()
            await self._sleep(_PUSH_INTERVAL_S)

    def _send_all(self, message: Down) -> None:
        for each in self._all:
            if each.process is not None:
                each.process.send(message)

    def _tell_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()
