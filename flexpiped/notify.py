"""Messages to the service manager, as ``sd_notify(3)`` sends them. Without ``$NOTIFY_SOCKET`` nothing happens."""

import asyncio
import socket
from collections.abc import Mapping
from contextlib import suppress


class Notifier:
    """Sends state to the socket that the service manager names in ``environment``."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        name = environment.get("NOTIFY_SOCKET", "")
        limit_us = environment.get("WATCHDOG_USEC", "")
        self._watchdog_s = int(limit_us) / 1e6 if limit_us.isdecimal() else 0.0
        self._address = "\0" + name[1:] if name.startswith("@") else name

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def reloading(self, *, monotonic_us: int) -> None:
        """The configuration is being read again; ``ready`` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={monotonic_us}")

    def stopping(self, status: str, *, within_s: float = 0.0) -> None:
        """It ends; the manager waits ``within_s``, or as long as it would anyway where that is longer."""
        longer = f"\nEXTEND_TIMEOUT_USEC={round(within_s * 1e6)}" if within_s else ""
        self._send(f"STOPPING=1\nSTATUS={status}{longer}")

    async def feed_watchdog(self) -> None:
        """Tell twice as often as is asked for that the event loop turns; returns at once where nobody watches it."""
        while self._watchdog_s:
            self._send("WATCHDOG=1")
            await asyncio.sleep(self._watchdog_s / 2)

    def _send(self, message: str) -> None:
        """Send without waiting. A manager that does not listen must not stop the service."""
        if not self._address:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            channel.sendto(message.encode(), self._address)
