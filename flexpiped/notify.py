"""Messages to the service manager, as ``sd_notify(3)`` sends them. Without ``$NOTIFY_SOCKET`` nothing happens."""

import socket
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """Sends state to the socket that the service manager names in ``environment``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + name[1:] if name.startswith("@") else name

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def reloading(self, *, monotonic_us: int) -> None:
        """The configuration is being read again; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_us}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def _send(self, message: str) -> None:
        """Send without waiting. A manager that does not listen must not stop the service."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            channel.sendto(message.encode(), self._address)
