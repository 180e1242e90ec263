"""What stands behind a backend in an ingress process: the daemon, over the link.

The same three that a backend has in the daemon, each a thing of its own there, too: who admits, who serves, and who
counts requests. What one of them raises is an ``ApiError``, as the daemon would have answered it.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from flexpiped.admission import Lease
from flexpiped.api.metrics import Endpoint, Metrics, Observation
from flexpiped.ingress.link import Link
from flexpiped.ingress.messages import (
    Admit,
    Arrived,
    AwaitDeath,
    Began,
    Board,
    Boarded,
    End,
    Finished,
    Reserve,
    Waited,
)
from flexpiped.keys import ANYBODY, Client

ANY_ENGINE: Final = 0


@dataclass(slots=True)
class _RemoteLease(Lease):
    """``number``: what the daemon knows it by."""

    number: int = 0


class RemoteAdmission:
    """Has the daemon admit requests for one model; it counts those of all processes together."""

    def __init__(self, link: Link, *, model: str, serial: int) -> None:
        self._link = link
        self._model = model
        self._serial = serial
        self._leases: dict[int, _RemoteLease] = {}
        self._waiting: list[str] = []  # names of the keys of those that wait for a place

    @property
    def requests_in_flight(self) -> int:
        return len(self._leases)

    @property
    def tokens_in_flight(self) -> int:
        return sum(each.tokens for each in self._leases.values())

    @property
    def requests_queued(self) -> int:
        return len(self._waiting)

    def in_flight_of(self, client: Client) -> int:
        """Return how many requests of a key are in flight or wait here."""
        return self._waiting.count(client.name) + sum(each.client == client for each in self._leases.values())

    @asynccontextmanager
    async def admit(self, client: Client = ANYBODY, *, deadline_s: float = math.inf) -> AsyncIterator[Lease]:
        """Take a place while the scope lasts. Raises: ApiError."""
        number = self._link.new_id()
        within_s = None if math.isinf(deadline_s) else max(0.0, deadline_s - asyncio.get_running_loop().time())
        self._waiting.append(client.name)
        try:
            await self._link.ask(Admit(number, self._model, self._serial, client, within_s))
        finally:
            self._waiting.remove(client.name)
        lease = self._leases[number] = _RemoteLease(client=client, deadline_s=deadline_s, number=number)
        try:
            yield lease
        finally:
            del self._leases[number]
            self._link.send(End(number))

    async def reserve(self, lease: Lease, *, tokens: int) -> None:
        """Reserve tokens for an admitted request. Raises: ApiError."""
        assert isinstance(lease, _RemoteLease), "it comes from admit"
        await self._link.ask(Reserve(self._link.new_id(), lease.number, tokens))
        lease.tokens += tokens


class RemoteEngine:
    """An engine that has a server of its own, which this process asks directly."""

    def __init__(self, link: Link, boarded: Boarded, *, model: str, capabilities: EngineCapabilities) -> None:
        self._link = link
        self._model = model
        self.number = boarded.engine
        server = capabilities.own_server if boarded.socket else None
        self.capabilities = replace(capabilities, name=boarded.name, own_server=server)
        self.own_routes_socket = Path(boarded.socket)
        self.own_routes_key = boarded.key
        self.is_gone = False

    async def died(self) -> str:
        """Wait until it has ended or was replaced. Raises: ApiError."""
        await self._link.ask(AwaitDeath(self._link.new_id(), self._model, self.number))
        self.is_gone = True
        return "the engine died"


class RemoteServing:
    """What serves a model, in the daemon. ``capabilities`` gives what is known of it here."""

    engines: tuple[Engine, ...] = ()  # there are none in this process

    def __init__(self, link: Link, *, model: str, serial: int, capabilities: Callable[[], EngineCapabilities]) -> None:
        self._link = link
        self._model = model
        self._serial = serial
        self._capabilities = capabilities

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities()

    async def ready_engine(self, *, other_than: Any = None) -> RemoteEngine:
        """Return an engine whose server can be asked. Raises: ApiError."""
        before = other_than.number if isinstance(other_than, RemoteEngine) else ANY_ENGINE
        boarded = await self._link.ask(Board(self._link.new_id(), self._model, before))
        assert isinstance(boarded, Boarded), "it is what answers Board"
        return RemoteEngine(self._link, boarded, model=self._model, capabilities=self._capabilities())

    def is_in_force(self, engine: Any) -> bool:
        """Whether nothing else is known here of an engine."""
        return isinstance(engine, RemoteEngine) and not engine.is_gone

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt. Raises: ApiError."""
        return self._link.generate(self._model, self._serial, request)


class RemoteObservation(Observation):
    """One request as it goes, told to the daemon, which counts it."""

    def __init__(self, link: Link, *, model: str, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self._link = link
        self._model = model
        self._endpoint = endpoint
        self._number = link.new_id()
        self._is_told = False  # of its beginning

    def asks(self) -> None:
        super().asks()
        self._link.send(Arrived(self._number, self._model, self._endpoint, self._age_s))
        self._is_told = True

    def admitted(self) -> None:
        super().admitted()
        self._link.send(Waited(self._number))

    def end(self) -> None:
        super().end()
        self._link.send(
            Finished(
                self._number,
                self._model,
                self._endpoint,
                self._age_s,
                self.outcome,
                self.prompt_tokens,
                self.completion_tokens,
                self._timed_tokens,
                max(0.0, self._clock() - self._last_s) if self._last_s else 0.0,
            )
        )

    def _note_first(self, at_s: float) -> None:
        super()._note_first(at_s)
        if self._is_told:
            self._link.send(Began(self._number))

    @property
    def _age_s(self) -> float:
        return self._clock() - self._began_s


class RemoteMetrics(Metrics):
    """Has the daemon count requests, as those of ``model``; empty: as nobody's."""

    def __init__(self, link: Link, *, model: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock=clock)
        self._link = link
        self._model = model
        self._now_s = clock

    @contextmanager
    def observe(self, endpoint: Endpoint, *, ago_s: float = 0.0) -> Iterator[Observation]:  # noqa: ARG002
        observation = RemoteObservation(self._link, model=self._model, endpoint=endpoint, clock=self._now_s)
        try:
            yield observation
        finally:
            observation.end()
