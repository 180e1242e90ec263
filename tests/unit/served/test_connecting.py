"""The first word from an engine's processes."""

import asyncio
from pathlib import Path

import pytest

from engines.served.connecting import await_ranks, connect_ranks

pytestmark = pytest.mark.real_loop


async def listen(path: Path) -> asyncio.Server:
    return await asyncio.start_unix_server(lambda _reader, writer: writer.close(), path)


async def test_a_rank_that_is_late_is_waited_for(tmp_path: Path) -> None:
    """Forgotten, it would be missing in each handover."""
    servers = [await listen(tmp_path / "rank-0.sock")]
    awaited = asyncio.create_task(await_ranks(tmp_path, count=2))
    found = await connect_ranks(tmp_path, count=2)
    assert list(found) == [0]  # where ranks without a channel are no fault
    assert not awaited.done()
    servers.append(await listen(tmp_path / "rank-1.sock"))
    late = await awaited
    assert sorted(late) == [0, 1]
    for channel in (*found.values(), *late.values()):
        await channel.close()
    for server in servers:
        server.close()


async def test_a_wait_that_is_broken_off_leaves_no_connection(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def until_closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        closed.set()

    server = await asyncio.start_unix_server(until_closed, tmp_path / "rank-0.sock")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await await_ranks(tmp_path, count=2)
    await asyncio.wait_for(closed.wait(), 5.0)
    server.close()
