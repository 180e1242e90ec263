"""Messages to the service manager."""

import asyncio
import socket
import uuid
from pathlib import Path

import pytest

from flexpiped.notify import Notifier


def receive(address: str, environment_name: str) -> list[str]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        notifier = Notifier({"NOTIFY_SOCKET": environment_name})
        notifier.status("loading")
        notifier.ready("serving")
        notifier.reloading(monotonic_us=7)
        notifier.stopping("draining")
        notifier.stopping("draining", within_s=90.5)
        return [manager.recv(4096).decode() for _ in range(5)]


EXPECTED = [
    "STATUS=loading",
    "READY=1\nSTATUS=serving",
    "RELOADING=1\nMONOTONIC_USEC=7",
    "STOPPING=1\nSTATUS=draining",
    "STOPPING=1\nSTATUS=draining\nEXTEND_TIMEOUT_USEC=90500000",
]


@pytest.mark.real_loop
def test_a_socket_in_the_file_system(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    assert receive(address, address) == EXPECTED


@pytest.mark.real_loop
def test_an_abstract_socket() -> None:
    name = f"flexpiped-test-{uuid.uuid4()}"
    assert receive("\0" + name, "@" + name) == EXPECTED


def test_no_manager_is_no_error(tmp_path: Path) -> None:
    Notifier({}).ready("serving")
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready("serving")


@pytest.mark.real_loop
async def test_the_watchdog_is_fed_for_as_long_as_the_loop_turns(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.setblocking(False)
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000"})
        feeding = asyncio.create_task(notifier.feed_watchdog())
        for _ in range(3):
            assert await asyncio.get_running_loop().sock_recv(manager, 4096) == b"WATCHDOG=1"
        feeding.cancel()


async def test_nobody_who_watches_is_fed() -> None:
    await Notifier({"NOTIFY_SOCKET": "/nowhere"}).feed_watchdog()
