"""The first word from an engine's processes, over the sockets in its run directory."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from engines.errors import EngineStartFailed
from engines.life import Life
from engines.served.channel import Channel, ChannelClosed, Message

ENGINE_SOCKET: Final = "engine.sock"
POLL_S: Final = 0.1
T = TypeVar("T")


async def first_contact(
    run_directory: Path, *, on_message: Callable[[Message], None], closed_by: str
) -> tuple[Channel, Message]:
    """Wait for the engine's socket, and return the channel with what the engine says of itself first.

    Args:
        on_message: Told all later messages that answer no call.
        closed_by: Who listens there, for people.

    Raises:
        ChannelClosed: The other side closed the channel without a word.
    """
    ready: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def take(message: Message) -> None:
        if ready.done():
            on_message(message)
        else:
            ready.set_result(message)

    channel = await _connect(run_directory / ENGINE_SOCKET, take)
    closed = asyncio.create_task(channel.wait_closed())
    try:
        awaited: list[asyncio.Future[Any]] = [ready, closed]
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise ChannelClosed(f"{closed_by} closed the token channel")
    except BaseException:
        await channel.close()
        raise
    finally:
        closed.cancel()
    return channel, ready.result()


async def before_death(contact: Coroutine[Any, Any, T], life: Life) -> T:
    """Return what ``contact`` does, as long as the engine lives. Raises: EngineError: It has ended before that."""
    contacting, death = asyncio.create_task(contact), asyncio.create_task(life.died())
    try:
        await asyncio.wait([contacting, death], return_when=asyncio.FIRST_COMPLETED)
        life.ensure()
        return await contacting
    finally:
        contacting.cancel()
        death.cancel()
        await asyncio.gather(contacting, death, return_exceptions=True)


async def connect_ranks(run_directory: Path, *, count: int) -> dict[int, Channel]:
    """Return the side channels of the ranks that have one, by global rank."""
    sides: dict[int, Channel] = {}
    for rank in range(count):
        with suppress(FileNotFoundError, ConnectionRefusedError):
            sides[rank] = await Channel.connect(_side_of(run_directory, rank))
    return sides


async def await_ranks(run_directory: Path, *, count: int) -> dict[int, Channel]:
    """Return the side channels of all ranks, by global rank; those that do not listen yet are waited for."""
    sides: dict[int, Channel] = {}
    try:
        for rank in range(count):
            sides[rank] = await _connect(_side_of(run_directory, rank))
    except BaseException:
        for side in sides.values():
            await side.close()
        raise
    return sides


def read_hub_token(file: str) -> str:
    """Return the hub token in ``file``; empty when there is no file. Blocks. Raises: EngineStartFailed."""
    try:
        return Path(file).read_text().strip() if file else ""
    except OSError as error:
        raise EngineStartFailed(f"cannot read the hub token in {file}: {error.strerror}") from error


def _side_of(run_directory: Path, rank: int) -> Path:
    return run_directory / f"rank-{rank}.sock"


async def _connect(path: Path, on_message: Callable[[Message], None] = lambda _message: None) -> Channel:
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return await Channel.connect(path, on_message=on_message)
        await asyncio.sleep(POLL_S)
