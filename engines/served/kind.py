"""What an engine with a server of its own adds to what all of them have in common (``engines.served.engine``).

It says how it is started, how requests and tokens travel, and what it can do.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from engines.protocol import EngineCapabilities
from engines.served.channel import Channel, Message
from engines.served.handovers import AfterMoves, HandoverSetup
from engines.served.logs import LogDialect
from engines.served.server import EngineServer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedSetup:
    """What the daemon's side needs to know of one engine, whichever it is, and what people read of it."""

    name: str
    listener: str  # the process at the other end of the channel
    dialect: LogDialect
    handover: HandoverSetup
    start_deadline_s: float
    hang_deadline_s: float


class ServedKind(ABC):
    """Called by ``ServedEngine`` alone, while it starts; ``generate`` is the protocol's."""

    @abstractmethod
    async def _version(self) -> str:
        """Return the version that will run. Raises: EngineStartFailed, UnsupportedByEngine."""

    @abstractmethod
    async def _launch(self, server: EngineServer, counts: Sequence[int]) -> None:
        """Start its processes with ``counts`` decoders on each rank. Raises: EngineStartFailed, UnsupportedByEngine."""

    @abstractmethod
    async def _contact(self, server: EngineServer) -> tuple[Channel, Message]:
        """Wait until it serves; return the channel to what schedules its steps, and what it says of itself."""

    @abstractmethod
    def _processes(self) -> list[tuple[int, str]]:
        """Return its processes with their names in words, those first that take others with them. ``info`` is set."""

    @abstractmethod
    def _take_over(self) -> EngineCapabilities:
        """Take over an engine that is ready, and return what it can do."""

    @abstractmethod
    def generate(self, request: Any) -> AsyncIterator[Any]:
        """As ``Engine.generate``."""

    def _after_moves(self) -> AfterMoves | None:
        """Return what follows its moves. The link and ``info`` are set."""
        return None

    def _secrets(self) -> dict[str, str]:
        """Return what the next daemon needs to speak with it."""
        return {}
