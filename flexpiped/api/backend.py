"""What the handlers work with."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aiohttp import web

from engines.protocol import Engine, EngineCapabilities, GenerationRequest, TokenChunk
from engines.text.protocol import Text
from flexpiped.adapter_set import AdapterSet
from flexpiped.admission import Admission
from flexpiped.api.errors import unavailable
from flexpiped.api.metrics import Metrics
from flexpiped.api.tool_syntax import ToolCalls
from flexpiped.keys import KeyRing
from flexpiped.status import Health, ServiceState
from topology.device import Device


class Serving(Protocol):
    """What serves requests: one supervised engine, or several."""

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Those that serve now."""

    @property
    def capabilities(self) -> EngineCapabilities | None:
        """What they can do; None before the first has served."""

    async def ready_engine(self, *, other_than: Engine | None = None) -> Engine:
        """Return an engine that serves, waiting for it where need be. Raises ``EngineDied``, ``EngineClosed``."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Continue the prompt as ``Engine.generate`` does, over deaths of engines. Close it to abort."""


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
    admission: Admission
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
