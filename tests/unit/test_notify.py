"""Messages to the service manager."""

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
        return [manager.recv(4096).decode() for _ in range(4)]


EXPECTED = [
    "STATUS=loading",
    "READY=1\nSTATUS=serving",
    "RELOADING=1\nMONOTONIC_USEC=7",
    "STOPPING=1\nSTATUS=draining",
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
