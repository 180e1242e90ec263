"""The daemon's connection with an engine core: the process is launched or adopted, its reports are read, it is ended.

launch or adopt --> send, reports come --> close: ended, or left to the next daemon
                                       +-> the process has ended by itself
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from engines.errors import EngineStartFailed
from engines.frames import read_frame, write_frame
from engines.launching import CoreProcess, launch_apart, launch_bound
from engines.native import client_messages as c
from engines.native.adopting import AdoptedCore
from engines.outliving import Outliving

CORE: Final = "engines.native.core"
_EXIT_GRACE_S: Final = 5.0


class CoreLink:
    """Used on one event loop.

    Args:
        python: The interpreter that runs the core.
        outliving: How the core may outlive this process; None: it ends with it.
        on_report: Told what the core says.
        on_end: Told that its process has ended, and how.
    """

    def __init__(
        self,
        python: str,
        outliving: Outliving | None,
        *,
        on_report: Callable[[c.CoreReport], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._python = python
        self._outliving = outliving
        self._on_report = on_report
        self._on_end = on_end
        self._process: CoreProcess | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """Of the core. Valid once there is one."""
        assert self._process is not None
        return self._process.pid

    async def launch(self) -> None:
        """Start a core and connect to it.

        Raises:
            EngineStartFailed
        """
        if self._outliving is None:
            process, connection = await launch_bound(self._python, CORE)
        else:
            try:
                process, connection = await launch_apart(self._python, self._outliving.place, CORE)
            except EngineStartFailed:
                self._outliving.forget()
                raise
        reader, self._writer = await asyncio.open_connection(sock=connection)
        self._begin(process, reader)

    def adopt(self, adopted: AdoptedCore) -> None:
        """Go on with a core that serves already."""
        self._writer = adopted.writer
        self._begin(adopted.process, adopted.reader)

    def send(self, command: c.ClientCommand) -> None:
        """Tell the core; one that was killed is noticed later."""
        if self._writer is not None and not self._writer.is_closing():
            write_frame(self._writer, c.encode(command))

    async def close(self, *, stays: bool, at_once: bool) -> None:
        """End the core and what it has started, or let go of it and leave it to the next daemon. Idempotent.

        Args:
            at_once: Kill it: it has no requests yet, and hears nothing before it is ready.
        """
        process, self._process = self._process, None
        if process is None:
            return
        if not stays:
            await self._end(process, grace_s=0.0 if at_once else _EXIT_GRACE_S)
        if self._reading is not None:
            self._reading.cancel()
            with suppress(asyncio.CancelledError):
                await self._reading
        if self._writer is not None:
            self._writer.close()
            with suppress(ConnectionError):
                await self._writer.wait_closed()
        process.let_go()

    def _begin(self, process: CoreProcess, reader: asyncio.StreamReader) -> None:
        self._process = process
        self._reading = asyncio.create_task(self._read(process, reader), name="native-engine-reader")

    async def _read(self, process: CoreProcess, reader: asyncio.StreamReader) -> None:
        while (raw := await read_frame(reader)) is not None:
            self._on_report(c.decode_report(raw))
        self._on_end(await process.ended())

    async def _end(self, process: CoreProcess, *, grace_s: float) -> None:
        with suppress(ConnectionError):
            self.send(c.Shutdown())
        try:
            await asyncio.wait_for(process.ended(), grace_s)
        except TimeoutError:
            process.kill()
            await process.ended()
        if self._outliving is not None:
            self._outliving.forget()
