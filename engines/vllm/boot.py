"""The start of one vLLM: its processes, and the first word from them."""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from engines.errors import EngineStartFailed
from engines.process import usable_cores
from engines.vllm.channel import Channel, ChannelClosed, Message
from engines.vllm.command import ENGINE_SOCKET, command_line, environment
from engines.vllm.options import VllmOptions
from engines.vllm.server import VllmServer

_POLL_S: Final = 0.1


async def launch(server: VllmServer, options: VllmOptions, *, counts: Sequence[int]) -> None:
    """Start vLLM's processes with ``counts`` decoders on each pipeline rank.

    Raises:
        EngineStartFailed, UnsupportedByEngine
    """
    env = environment(
        options,
        counts=counts,
        run_dir=server.run_directory,
        inherited=os.environ,
        daemon_prefix=sys.prefix,
        cores=usable_cores(),
        hf_token=await asyncio.to_thread(_read_token, options.hf_token_file),
    )
    command = command_line(options, counts=counts, run_dir=server.run_directory)
    await server.spawn(options.python, command, env)


async def first_contact(run_directory: Path, *, on_message: Callable[[Message], None]) -> tuple[Channel, Message]:
    """Wait until vLLM serves, and return the token channel with what vLLM says of itself.

    Raises:
        ChannelClosed: It closed the channel without a word.
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
            raise ChannelClosed("vLLM's API server closed the token channel")
    except BaseException:
        await channel.close()
        raise
    finally:
        closed.cancel()
    return channel, ready.result()


async def connect_workers(run_directory: Path, *, count: int) -> dict[int, Channel]:
    """Return the side channels of the workers that have one, by global rank."""
    sides: dict[int, Channel] = {}
    for rank in range(count):
        with suppress(FileNotFoundError, ConnectionRefusedError):
            sides[rank] = await Channel.connect(run_directory / f"rank-{rank}.sock")
    return sides


async def _connect(path: Path, on_message: Callable[[Message], None]) -> Channel:
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return await Channel.connect(path, on_message=on_message)
        await asyncio.sleep(_POLL_S)


def _read_token(file: str) -> str:
    try:
        return Path(file).read_text().strip() if file else ""
    except OSError as error:
        raise EngineStartFailed(f"cannot read the hub token in {file}: {error.strerror}") from error
