"""Is what the processes of an engine held free again? Asked before anything is planned on their devices once more.

A process that was killed gives its memory back when the kernel has taken it apart, and a driver can hold that up. On
the host it is free when the process runs no more. What a GPU still holds for a process, its library says: that is
another ``MemoryCheck``, for devices that topology has discovered.
"""

import asyncio
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from engines.errors import EngineStartFailed
from engines.process import memory_pss_bytes, state_of
from topology.units import format_bytes

_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that stays the same one when its number is given to another: with when it began, in kernel ticks."""

    pid: int
    started: str


class MemoryCheck(Protocol):
    """Looks at one kind of memory."""

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        """Say what these processes still hold, a part of a sentence for each; nothing when all of it is free."""


class HostMemory:
    """Memory of the host, and of CPU devices."""

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        return tuple(
            f"process {process.pid} with {format_bytes(memory_pss_bytes(process.pid) or 0)}"
            for process in sorted(processes, key=lambda each: each.pid)
            if still_runs(process)
        )


def identify(pids: Iterable[int]) -> set[ProcessId]:
    """Return those of ``pids`` that run now."""
    return {ProcessId(pid, found[1]) for pid in pids if (found := state_of(pid)) is not None}


def still_runs(process: ProcessId) -> bool:
    """Return whether it holds memory: a zombie does not."""
    found = state_of(process.pid)
    return found is not None and found[1] == process.started and found[0] not in "ZX"


async def until_free(processes: Collection[ProcessId], check: MemoryCheck, *, deadline_s: float) -> tuple[str, ...]:
    """Wait until these processes hold nothing; return what they still hold after ``deadline_s``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            while check.held(processes):  # noqa: ASYNC110  the kernel tells nobody of a grandchild
                await asyncio.sleep(_POLL_S)
    return check.held(processes)


class Departed:
    """Engines that were killed while something of theirs was still there, by the devices that they ran on."""

    def __init__(self, check: MemoryCheck = HostMemory()) -> None:
        self._check = check
        self._known: list[tuple[frozenset[str], frozenset[ProcessId]]] = []

    def note(self, device_ids: Iterable[str], processes: Iterable[ProcessId]) -> None:
        """Remember who ran there."""
        self._known.append((frozenset(device_ids), frozenset(processes)))

    async def ensure_free(self, device_ids: Collection[str], *, deadline_s: float) -> None:
        """Return when nobody who has ended holds memory of these devices.

        Raises:
            EngineStartFailed: Somebody still does after ``deadline_s``; the message says who and how much.
        """
        self._known = [entry for entry in self._known if self._check.held(entry[1])]
        there = [entry for entry in self._known if not entry[0].isdisjoint(device_ids)]
        processes = frozenset[ProcessId]().union(*(entry[1] for entry in there))
        held = await until_free(processes, self._check, deadline_s=deadline_s)
        if held:
            devices = ", ".join(sorted(frozenset[str]().union(*(entry[0] for entry in there))))
            raise EngineStartFailed(
                f"the memory of an engine that has ended is not free on {devices}: {', '.join(held)}"
            )
