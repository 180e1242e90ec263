"""Signals only set flags; the daemon acts on them."""

import asyncio
import signal


class Signals:
    """SIGTERM and SIGINT ask for a graceful stop, the second one for an immediate stop; SIGHUP for a reload."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.stop_now = asyncio.Event()
        self.reload = asyncio.Event()
        self.stopped_by = ""

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take the signals of this process. Call it on the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.ask_stop, number.name)
        loop.add_signal_handler(signal.SIGHUP, self.reload.set)

    def ask_stop(self, name: str) -> None:
        if self.stop.is_set():
            self.stop_now.set()
        self.stopped_by = self.stopped_by or name
        self.stop.set()
