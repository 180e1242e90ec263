"""What the handlers work with."""

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

from aiohttp import web

from engines.offers import OwnRoutes
from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from engines.text.protocol import Text
from flexpiped.adapter_set import AdapterSet
from flexpiped.admission import Lease
from flexpiped.api.errors import unavailable
from flexpiped.api.metrics import Metrics
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.keys import ANYBODY, Client, KeyRing
from flexpiped.status import Health, ServiceState
from topology.device import Device


class Reached(Protocol):
    """An engine, as far as a request for its own server needs it."""

    @property
    def capabilities(self) -> EngineCapabilities: ...

    async def died(self) -> str:
        """Wait until it has ended unasked, and return the reason in words."""


def own_routes_of(engine: Reached) -> OwnRoutes | None:
    """Return it as an engine with a server of its own, None where its capabilities, which promise it, have none."""
    if engine.capabilities.own_server is None:
        return None
    return cast("OwnRoutes", engine)  # to look whether it has a protocol's members is slow, and done for each request


class Serving(Protocol):
    """What serves requests: one supervised engine, or several, in this process or in another."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that serve now."""

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """What they can do; None before the first has served."""

    async def ready_engine(self, *, other_than: Any = None) -> Reached:
        """Return an engine that serves, waiting for it where need be. Raises ``EngineDied``, ``EngineClosed``.

        Args:
            other_than: One that it returned before, and that is not wanted again.
        """

    def is_in_force(self, engine: Any) -> bool:
        """Whether an engine that ``ready_engine`` returned takes requests still."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt as ``Engine.generate`` does, over deaths of engines. Close it to abort."""


class Admits(Protocol):
    """Who decides how much may be in flight (``flexpiped.admission``). Readings are of this process."""

    @property
    def requests_in_flight(self) -> int: ...

    @property
    def tokens_in_flight(self) -> int: ...

    @property
    def requests_queued(self) -> int: ...

    def in_flight_of(self, client: Client) -> int:
        """Return how many requests of a key are in flight or wait."""

    def admit(
        self, client: Client = ANYBODY, *, deadline_s: float = math.inf
    ) -> contextlib.AbstractAsyncContextManager[Lease]:
        """Take a place for one request while the scope lasts. Raises: Overloaded, or ApiError of another process."""

    async def reserve(self, lease: Lease, *, tokens: int) -> None:
        """Reserve tokens for an admitted request. Raises: as ``admit``."""


class Uses:
    """Counts requests that a backend answers now."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one request as long as the scope lasts."""
        self.count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    async def idle(self) -> None:
        """Return once it answers none."""
        await self._idle.wait()


_SERIALS: Final = itertools.count(1)


def random_seed() -> int:
    """Return 63 random bits, for a request that gives no seed."""
    return secrets.randbits(63)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One served model with everything that answers for it.

    ``health`` decides readiness and whether new requests are taken; the tests give fixed clocks and seeds.
    """

    model: str
    serving: Serving
    text: Text
    admission: Admits
    metrics: Metrics
    health: Callable[[], Health]
    devices: Callable[[], Sequence[Device]] = lambda: ()  # of this host, as they are now; blocks
    new_seed: Callable[[], int] = random_seed
    wall_clock: Callable[[], float] = time.time
    keys: Callable[[], KeyRing | None] = lambda: None  # None: no key is asked for
    adapters: AdapterSet | None = None  # the LoRA adapters, where they may change
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)  # for requests that do not say it
    tool_calls: ToolCalls | None = None  # how the model calls tools; None: that is not known
    body_deadline_s: float = 60.0
    death_noticed_s: float = 3.0  # within this time the death of an engine is known
    created_unix_s: int = field(default_factory=lambda: int(time.time()))
    uses: Uses = field(default_factory=Uses)
    serial: int = field(default_factory=_SERIALS.__next__)  # tells it from one that takes its place under its name

    def ensure_serving(self) -> EngineCapabilities:
        """Return what the engine can do; requests are taken while it recovers, and wait.

        Raises:
            ApiError: 503, nothing can be served now.
        """
        health = self.health()
        if health.state in (ServiceState.DRAINING, ServiceState.FAILED, ServiceState.STOPPED):
            raise unavailable(health.reason or health.state.value, code=health.state.value)
        capabilities = self.serving.capabilities
        if capabilities is None:
            raise unavailable("the engine is starting", code=ServiceState.STARTING.value)
        return capabilities


_CHOSEN: Final = web.RequestKey("backend", Backend)


def choose(http: web.Request, backend: Backend) -> None:
    """Note that ``backend`` answers the request."""
    http[_CHOSEN] = backend


def backend_of(http: web.Request) -> Backend:
    """Return the backend that answers the request."""
    return http[_CHOSEN]
