"""What happened, for operators: a bounded ring of numbered events, and followers that read it at their own pace.

A follower keeps only its place in the ring, so it never holds up whoever publishes. One that falls behind by more than
the ring holds is told how many events it missed and goes on with the oldest that is left.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class EventKind(Enum):
    DAEMON = "daemon"  # started, ready, reloaded, draining, stopped
    ENGINE = "engine"  # started, died, restarted, compiled again after a move
    REFACTORING = "refactoring"  # asked for, progress, done, refused, aborted
    DECISION = "decision"  # what the policy came to: what changes something here, all in a log of its own
    MODEL = "model"  # one of several started, stopped, or gave way to another
    DEVICES = "devices"  # a GPU appeared, left or got worse; others took or freed memory
    MISSED = "missed"  # events that this follower can no longer get


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened. ``fields`` hold values that JSON can carry."""

    sequence: int
    time_unix_s: float
    kind: EventKind
    message: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """Return the event as the admin API sends it."""
        return {
            "sequence": self.sequence,
            "time_unix_s": self.time_unix_s,
            "kind": self.kind.value,
            "message": self.message,
            "fields": dict(self.fields),
        }


class EventLog:
    """The last ``capacity`` events. Used on one event loop only.

    Args:
        on_publish: Told each event before any follower; it must not wait.
    """

    def __init__(
        self,
        *,
        capacity: int = 1000,
        wall_clock: Callable[[], float] = time.time,
        on_publish: Callable[[Event], object] = lambda _event: None,
    ) -> None:
        self._ring: deque[Event] = deque(maxlen=capacity)
        self._wall_clock = wall_clock
        self._on_publish = on_publish
        self._last_sequence = 0
        self._published = asyncio.Event()
        self._closed = False

    @property
    def last_sequence(self) -> int:
        """Number of the newest event; 0 before there is one."""
        return self._last_sequence

    def publish(self, kind: EventKind, message: str, **fields: Any) -> Event:
        """Append an event and wake the followers. Never waits."""
        self._last_sequence += 1
        event = Event(
            sequence=self._last_sequence, time_unix_s=self._wall_clock(), kind=kind, message=message, fields=fields
        )
        self._ring.append(event)
        self._on_publish(event)
        self._published.set()
        self._published = asyncio.Event()
        return event

    def since(self, sequence: int) -> tuple[Event, ...]:
        """Return the events after number ``sequence``, oldest first, with a notice before them if some are gone."""
        found = tuple(event for event in self._ring if event.sequence > sequence)
        missed = self._last_sequence - sequence - len(found)
        return found if missed <= 0 else (self._notice(sequence, missed), *found)

    async def follow(self, *, since: int) -> AsyncIterator[Event]:
        """Yield the events after number ``since``, then each new one as it comes, until the log is closed."""
        place = since
        while True:
            published = self._published
            for event in self.since(place):
                place = event.sequence
                yield event
            if place < self._last_sequence:
                continue
            if self._closed:
                return
            await published.wait()

    def close(self) -> None:
        """Let followers end once they have read everything."""
        self._closed = True
        self._published.set()

    def of_model(self, name: Callable[[], str]) -> "EventLog":
        """Return this log for one model, whose name its events bear; where the name is empty, they bear none."""
        return _ModelLog(self, name)

    def _notice(self, sequence: int, missed: int) -> Event:
        return Event(
            sequence=sequence + missed,
            time_unix_s=self._wall_clock(),
            kind=EventKind.MISSED,
            message=f"{missed} events were dropped: this follower is slower than they come",
            fields={"missed": missed},
        )


class _ModelLog(EventLog):
    """A log that only writes into another one, and reads there."""

    def __init__(self, log: EventLog, name: Callable[[], str]) -> None:
        super().__init__(capacity=1)
        self._log = log
        self._name = name

    @property
    def last_sequence(self) -> int:
        return self._log.last_sequence

    def publish(self, kind: EventKind, message: str, **fields: Any) -> Event:
        name = self._name()
        return self._log.publish(kind, message, **fields, **({"model": name} if name else {}))

    def since(self, sequence: int) -> tuple[Event, ...]:
        return self._log.since(sequence)

    def follow(self, *, since: int) -> AsyncIterator[Event]:
        return self._log.follow(since=since)
