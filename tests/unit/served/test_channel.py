"""JSON lines: calls and messages."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.served.channel import CallFailed, Channel, ChannelClosed, Message
from tests.support.until import until

pytestmark = pytest.mark.real_loop


class Peer:
    """The other side, as a test plays it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def receive(self) -> Message:
        message: Message = json.loads(await self._reader.readline())
        return message

    def send(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


@asynccontextmanager
async def connected(directory: Path, messages: list[Message]) -> AsyncIterator[tuple[Channel, Peer]]:
    peers: asyncio.Queue[Peer] = asyncio.Queue()
    path = directory / "s"
    server = await asyncio.start_unix_server(lambda r, w: peers.put_nowait(Peer(r, w)), path)
    channel = await Channel.connect(path, on_message=messages.append)
    peer = await peers.get()
    try:
        yield channel, peer
    finally:
        await channel.close()
        peer.writer.close()
        server.close()


async def test_answers_find_their_calls_in_any_order(tmp_path: Path) -> None:
    async with connected(tmp_path, []) as (channel, peer):
        first, second = asyncio.create_task(channel.call("a", x=1)), asyncio.create_task(channel.core("b", 2, "c"))
        asked = [await peer.receive(), await peer.receive()]
        assert asked[0] == {"op": "a", "call": 1, "x": 1}
        assert asked[1] == {"op": "core", "call": 2, "method": "flexpiped_b", "args": [2, "c"]}
        peer.send(op="reply", call=2, result={"y": 2})
        peer.send(op="reply", call=1, result=None)
        assert (await first, await second) == (None, {"y": 2})


async def test_a_call_can_fail(tmp_path: Path) -> None:
    async with connected(tmp_path, []) as (channel, peer):
        call = asyncio.create_task(channel.call("a"))
        await peer.receive()
        peer.send(op="reply", call=1, error="it cannot")
        with pytest.raises(CallFailed, match="it cannot"):
            await call


async def test_progress_goes_to_its_call_and_messages_to_their_owner(tmp_path: Path) -> None:
    messages: list[Message] = []
    progress: list[Message] = []
    async with connected(tmp_path, messages) as (channel, peer):
        call = asyncio.create_task(channel.call("a", on_progress=progress.append))
        await peer.receive()
        peer.send(op="outputs", items=[])
        peer.send(op="progress", call=1, done=3)
        peer.send(op="reply", call=1, result=0)
        await call
        peer.send(op="reply", call=77, result="of a call that was given up")
        peer.send(op="last")
        await until(lambda: len(messages) == 2)
    assert [message["op"] for message in messages] == ["outputs", "last"]
    assert progress == [{"op": "progress", "call": 1, "done": 3}]


async def test_the_end_of_the_other_side_ends_all_calls(tmp_path: Path) -> None:
    async with connected(tmp_path, []) as (channel, peer):
        call = asyncio.create_task(channel.call("a"))
        await peer.receive()
        peer.writer.close()
        with pytest.raises(ChannelClosed):
            await call
        await channel.wait_closed()
        with pytest.raises(ChannelClosed):
            await channel.call("b")
        channel.send({"op": "nobody hears it"})


async def test_a_long_line_passes(tmp_path: Path) -> None:
    messages: list[Message] = []
    async with connected(tmp_path, messages) as (_channel, peer):
        peer.send(op="outputs", items=list(range(200_000)))
        await until(lambda: bool(messages))
    assert len(messages[0]["items"]) == 200_000
