"""Has workers load the stages of the layout in force: at the start, and again where one was lost."""

import asyncio
from collections.abc import Callable, Mapping

from engines.native import messages as m
from engines.native.inquiries import settle


class StageNotLoaded(Exception):
    """A worker could not load its layers; the message is for the operator."""


class StageLoading:
    """The core's side of it. A handover loads by itself; what is not of one has number 0."""

    def __init__(self, send: Callable[[int, m.WorkerCommand], None]) -> None:
        self._send = send
        self._waiting: dict[int, asyncio.Future[None]] = {}  # by worker

    async def load(self, specs: Mapping[int, m.StageSpec]) -> None:
        """Have each worker load the layers of its role that it lacks.

        Raises:
            StageNotLoaded
        """
        loop = asyncio.get_running_loop()
        waiting = []
        for index, spec in specs.items():
            self._waiting[index] = loop.create_future()
            waiting.append(self._waiting[index])
            self._send(index, m.Prepare(handover=0, spec=spec))
        await asyncio.gather(*waiting)

    def on_report(self, report: m.Prepared | m.Failed) -> None:
        """Take in what a worker says of a load that is not of a handover."""
        if isinstance(report, m.Failed):
            self.failed(report.worker, report.reason)
        elif report.done:
            settle(self._waiting.pop(report.worker, None), None)

    def failed(self, index: int, reason: str) -> None:
        """A worker cannot load its layers, or has died."""
        waiting = self._waiting.pop(index, None)
        if waiting is not None and not waiting.done():
            waiting.set_exception(StageNotLoaded(reason))
