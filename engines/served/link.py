"""Calls of an engine's processes, with what they ended of where one is not answered any more."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.errors import EngineError
from engines.life import Life
from engines.served.channel import CallFailed, Channel, ChannelClosed, Message
from engines.served.connecting import connect_ranks


class EngineLink:
    """The channels to one engine that serves.

    Args:
        name: The engine's, for people.
        listener: The process at the other end of ``channel``, likewise.
        on_lost: Told in words when a channel is gone, so that the engine is or soon will be; its life ends there.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        name: str,
        listener: str,
        life: Life,
        on_lost: Callable[[str], None],
    ) -> None:
        self.channel = channel
        self.sides: dict[int, Channel] = {}  # of the ranks that have one, by global rank
        self._name = name
        self._listener = listener
        self._life = life
        self._on_lost = on_lost

    async def connect_ranks(self, run_directory: Path, *, count: int) -> None:
        """Connect to the ranks of an engine that is ready."""
        self.sides.update(await connect_ranks(run_directory, count=count))

    async def core(self, method: str) -> Any:
        """Call what schedules the engine's steps.

        Raises:
            EngineDied, EngineClosed: It has ended.
            EngineError: It refused the call.
        """
        self._life.ensure()
        try:
            return await self.channel.core(method)
        except ChannelClosed:
            self._raise_end()
            raise
        except CallFailed as error:
            self._life.ensure()
            raise EngineError(f"{self._name} refused {method}: {error}") from error

    async def rank_statuses(self) -> dict[int, Message]:
        """Ask all ranks at once how they are. Raises as ``core``."""
        self._life.ensure()
        try:
            answers = await asyncio.gather(*(side.call("status") for side in self.sides.values()))
        except ChannelClosed:
            self._raise_end()
            raise
        except CallFailed as error:
            self._life.ensure()
            raise EngineError(f"{self._name} refused to say how its stages are: {error}") from error
        return dict(zip(self.sides, answers, strict=True))

    def send(self, message: Message) -> None:
        """Send a message that is not answered."""
        self.channel.send(message)

    async def arm_failpoint(self, name: str, action: str, *, rank: int | None = None) -> None:
        """Arm a failpoint in the engine core, or in the worker of one rank; an empty name disarms all there."""
        if rank is None:
            await self.channel.core("arm", name, action)
        else:
            await self.sides[rank].call("arm", name=name, action=action)

    async def close(self) -> None:
        for channel in (*self.sides.values(), self.channel):
            await channel.close()

    def _raise_end(self) -> None:
        if self._life.end is None:
            self._on_lost(f"{self._listener} closed its channel to the daemon")
        self._life.ensure()
