"""Feeds every open dashboard from one place: the daemon is read once a second, however many look on.

Of several models a dashboard shows the one that it asks for, or the first.

Points of the plots are kept whether or not anybody looks, so that a page that opens shows the last quarter of an hour.
The rest is read only while somebody does: it asks engines and the memory of their processes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Final

from flexpiped.dashboard.messages import Message, Topic
from flexpiped.dashboard.readings import Point, Series, point_of, topology_to_wire
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.status import StatusSource
from planner.load import Observation

PERIOD_S: Final = 1.0
_POINTS_KEPT: Final = 900
_EVENTS_SHOWN: Final = 200
_MOST_WATCHERS: Final = 64
_STATUS_DEADLINE_S: Final = 5.0
_TOPOLOGY_PERIOD_S: Final = 15.0  # what others hold on a GPU changes


class NoStream(Exception):
    """There cannot be one now: as many dashboards are open as may be, the daemon ends, or its engine hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where everything comes from that is shown: what ``flexctl`` is answered from, too.

    ``models`` are the names of all models, the first first. ``load`` is what the policy of one sees; ``topology`` looks
    at the hardware, and blocks. Events and decisions bear the name of their model where there are several.
    """

    status: StatusSource
    models: Callable[[], Sequence[str]]
    tokens_per_s: Callable[[str], float | None]
    load: Callable[[str], Observation]
    events: EventLog
    decisions: EventLog
    topology: Callable[[], Mapping[str, Any]]


@dataclass(slots=True, kw_only=True)
class _Seen:
    """How far one watcher has come, and of which model; empty: of the first."""

    model: str
    event: int
    decision: int
    status: int
    point: int
    topology: int


class Feed:
    """Used on one event loop. ``run_forever`` runs beside the service."""

    def __init__(
        self,
        sources: Sources,
        *,
        period_s: float = PERIOD_S,
        wall_clock: Callable[[], float] = time.time,
        monotonic_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = sources
        self._period_s = period_s
        self._wall_clock = wall_clock
        self._monotonic_clock = monotonic_clock
        self._series: dict[str, Series] = {}  # by model
        self._point: tuple[int, Mapping[str, Point]] = (0, {})  # each with the number of its reading
        self._status: tuple[int, Mapping[str, Any]] = (0, {})
        self._topology: tuple[int, Mapping[str, Any]] = (0, {})
        self._topology_read_s: float | None = None
        self._reading = asyncio.Lock()
        self._hurry = asyncio.Event()  # something happened after which the status is another one
        self._changed = asyncio.Event()
        self._watchers = 0
        self._generation = 0
        self._end_reason = ""
        self._is_closed = False

    async def run_forever(self) -> None:
        """Read the daemon once a second, and sooner when something happened."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sample_forever())
            group.create_task(self._follow(self._sources.events))
            group.create_task(self._follow(self._sources.decisions))

    def end_streams(self, reason: str) -> None:
        """End every stream that is open; a page that is open asks again."""
        self._generation += 1
        self._end_reason = reason
        self._tell()

    def close(self, reason: str) -> None:
        """End every stream, and begin no other one."""
        self._is_closed = True
        self.end_streams(reason)

    async def watch(self, model: str = "") -> AsyncIterator[Message]:
        """Yield what was before, then what is new as it comes, until the feed ends the stream.

        Of ``model``, or of the first where there is none of that name.
        A watcher that is slow gets the newest status and no older one; events it gets as far as the logs go back.

        Raises:
            NoStream: Before the first message.
        """
        with self._counted():
            generation = self._generation
            await self._read()
            if not self._status[1]:
                raise NoStream(f"the engine has not answered for {_STATUS_DEADLINE_S:g} s")
            seen = self._now(model)
            yield self._hello(model)
            while generation == self._generation:
                changed = self._changed
                for message in self._news(seen):
                    yield message
                await changed.wait()
            for message in self._news(seen):  # what happened last is told, too
                yield message
            yield Message(topic=Topic.BYE, data={"reason": self._end_reason})

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._is_closed:
            raise NoStream(self._end_reason)
        if self._watchers >= _MOST_WATCHERS:
            raise NoStream(f"{self._watchers} dashboards are open already, and no more may be")
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    async def _sample_forever(self) -> None:
        next_point_s = self._monotonic_clock()
        is_due = True
        while True:
            if is_due:
                next_point_s = max(next_point_s + self._period_s, self._monotonic_clock())
                self._add_point()
            if self._watchers:
                await self._read()
            self._tell()
            is_due = not await self._hurried(next_point_s)

    async def _hurried(self, until_s: float) -> bool:
        """Wait until something happened (True), or until then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - self._monotonic_clock())):
                await self._hurry.wait()
        is_asked = self._hurry.is_set()
        self._hurry.clear()
        return is_asked

    async def _follow(self, log: EventLog) -> None:
        async for event in log.follow(since=log.last_sequence):
            if _changes_status(event):
                self._hurry.set()
            if event.kind is EventKind.DEVICES:
                self._topology_read_s = None
            self._tell()

    def _add_point(self) -> None:
        sources, now_unix_s = self._sources, self._wall_clock()
        points = {
            name: point_of(sources.load(name), time_unix_s=now_unix_s, tokens_per_s=sources.tokens_per_s(name))
            for name in sources.models()
        }
        self._series = {name: self._series.get(name) or Series(kept=_POINTS_KEPT) for name in points}
        for name, point in points.items():
            self._series[name].add(point)
        self._point = (self._point[0] + 1, points)

    async def _read(self) -> None:
        """Read status and topology anew; two that want it at once share one reading after the other."""
        async with self._reading:
            with suppress(TimeoutError):  # an engine that hangs; events and points go on meanwhile
                async with asyncio.timeout(_STATUS_DEADLINE_S):
                    self._status = (self._status[0] + 1, await self._sources.status.status())
            now_s = self._monotonic_clock()
            if self._topology_read_s is None or now_s - self._topology_read_s >= _TOPOLOGY_PERIOD_S:
                self._topology_read_s = now_s
                found = await asyncio.to_thread(lambda: topology_to_wire(self._sources.topology()))
                if found != self._topology[1]:
                    self._topology = (self._topology[0] + 1, found)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _shown(self, model: str) -> str:
        """Return the name of the model that is shown to who asks for ``model``; empty: there is none at all."""
        models = self._sources.models()
        return model if model in models else next(iter(models), "")

    def _status_of(self, model: str) -> Mapping[str, Any]:
        """Return the status as it is where that model is the first."""
        status, shown = self._status[1], self._shown(model)
        own = next((each for each in status.get("models", ()) if each["model"]["name"] == shown), None)
        return status if own is None else {**own, "models": status["models"]}

    def _decided(self, model: str, events: Sequence[Event]) -> Iterator[Event]:
        """Yield the decisions about the model that is shown."""
        shown = self._shown(model)
        return (each for each in events if each.fields.get("model", shown) == shown)

    def _now(self, model: str) -> _Seen:
        return _Seen(
            model=model,
            event=self._sources.events.last_sequence,
            decision=self._sources.decisions.last_sequence,
            status=self._status[0],
            point=self._point[0],
            topology=self._topology[0],
        )

    def _hello(self, model: str) -> Message:
        shown = self._shown(model)
        series = self._series.get(shown) or Series(kept=_POINTS_KEPT)
        data = {
            "now_unix_s": self._wall_clock(),
            "period_s": self._period_s,
            "cv_windows_s": [window.window_s for window in self._sources.load(shown).windows],
            "status": self._status_of(model),
            "topology": self._topology[1],
            "points": series.to_wire(),
            "events": _last(self._sources.events.since(0)),
            "decisions": _last(tuple(self._decided(model, self._sources.decisions.since(0)))),
        }
        return Message(topic=Topic.HELLO, data=data)

    def _news(self, seen: _Seen) -> Iterator[Message]:
        """Yield what the watcher has not had, and note that it has it now."""
        for event in self._sources.events.since(seen.event):
            seen.event = event.sequence
            yield Message(topic=Topic.EVENT, data=event.to_wire())
        new = self._sources.decisions.since(seen.decision)
        seen.decision = new[-1].sequence if new else seen.decision
        for decision in self._decided(seen.model, new):
            yield Message(topic=Topic.DECISION, data=decision.to_wire())
        if seen.topology != self._topology[0]:
            seen.topology = self._topology[0]
            yield Message(topic=Topic.TOPOLOGY, data=self._topology[1])
        if seen.status != self._status[0]:
            seen.status = self._status[0]
            yield Message(topic=Topic.STATUS, data=self._status_of(seen.model))
        number, points = self._point
        point = points.get(self._shown(seen.model))
        if seen.point != number and point is not None:
            seen.point = number
            yield Message(topic=Topic.POINT, data=asdict(point))


def _last(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the newest of these events, of each handover without its progress but the last report."""
    newest = [event for event in events if event.kind is not EventKind.MISSED]
    last_report = {event.fields["handover"]: event for event in newest if event.fields.get("state") == "progress"}
    shown = [
        event
        for event in newest
        if event.fields.get("state") != "progress" or last_report[event.fields["handover"]] is event
    ]
    return [event.to_wire() for event in shown[-_EVENTS_SHOWN:]]


def _changes_status(event: Event) -> bool:
    if event.kind is EventKind.REFACTORING:
        return event.fields.get("state") in ("plan", "ended")
    return event.kind in (EventKind.ENGINE, EventKind.DAEMON)
