"""Questions to the core and refactorings that are under way, by number: who waits for what it says of them."""

import asyncio
from typing import Any

from engines.errors import EngineError
from engines.native import client_messages as c
from engines.protocol import RefactorProgress
from planner.layout import Pipeline

Reports = asyncio.Queue[RefactorProgress | c.Refactored]


class Calls:
    """Used on one event loop. Number 0 is the start."""

    def __init__(self) -> None:
        self._last = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._refactorings: dict[int, tuple[Pipeline, Reports]] = {}

    def next_number(self) -> int:
        """Return a number that names one question, refactoring or request."""
        self._last += 1
        return self._last

    def expect(self, call: int) -> "asyncio.Future[Any]":
        """Return what the answer to a question will settle."""
        self._answers[call] = asyncio.get_running_loop().create_future()
        return self._answers[call]

    def settle(self, call: int, reply: object) -> None:
        """Take in an answer."""
        future = self._answers.pop(call, None)
        if future is not None and not future.done():
            future.set_result(reply)

    def refactoring(self, call: int, target: Pipeline) -> Reports:
        """Return what the core will say of a refactoring; a ``Refactored`` is the last."""
        reports: Reports = asyncio.Queue()
        self._refactorings[call] = target, reports
        return reports

    def progress(self, report: c.Progress) -> Pipeline:
        """Take in how far a refactoring is, and return what it leads to."""
        target, reports = self._refactorings[report.call]
        reports.put_nowait(report.progress)
        return target

    def refactored(self, report: c.Refactored) -> None:
        """Take in how a refactoring has ended."""
        self._refactorings.pop(report.call)[1].put_nowait(report)

    def end(self, end: EngineError) -> None:
        """No answers will come: everybody who waits learns why."""
        for future in self._answers.values():
            if not future.done():
                future.set_exception(end)
        self._answers.clear()
        for call, (_target, reports) in self._refactorings.items():
            reports.put_nowait(c.Refactored(call=call, error=type(end).__name__, message=str(end)))
        self._refactorings.clear()
