"""Where an engine core without a daemon waits for the next one."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from engines.reception import Reception, peer_of

pytestmark = pytest.mark.real_loop


def reception_at(path: Path) -> Reception:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    return Reception(listener)


async def test_the_next_daemon_is_let_in(tmp_path: Path) -> None:
    reception = reception_at(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as daemon:
        daemon.connect(str(tmp_path / "s"))
        assert peer_of(daemon) == (os.getpid(), os.getuid())  # of who listens: the engine proves itself
        connection = await reception.next_daemon(within_s=60.0)
        assert connection is not None
        connection.close()
    reception.close()
    assert not (tmp_path / "s").exists()


async def test_nobody_comes_in_time(tmp_path: Path) -> None:
    reception = reception_at(tmp_path / "s")
    assert await reception.next_daemon(within_s=0.05) is None
    reception.close()


async def test_nobody_can_come_once_the_socket_is_gone_or_another_one(tmp_path: Path) -> None:
    reception = reception_at(tmp_path / "s")
    waiting = asyncio.create_task(reception.next_daemon(within_s=600.0))
    await asyncio.sleep(0)
    (tmp_path / "s").rename(tmp_path / "kept")  # so that the other one cannot get its inode
    other = reception_at(tmp_path / "s")
    assert await waiting is None
    reception.close()
    assert (tmp_path / "s").exists()
    other.close()
