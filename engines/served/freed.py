"""Is what the processes of an engine held free again? Asked before anything is planned on their devices once more.

A process that was killed gives its memory back when the kernel has taken it apart, and a driver can hold that up. On
the host it is free when the process runs no more. What a GPU still holds for a process, the driver says.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from engines.errors import EngineStartFailed
from engines.process import memory_pss_bytes, state_of
from topology.gpu_memory import HeldMemory, held_memory
from topology.units import format_bytes

_POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that stays the same one when its number is given to another: with when it began, in kernel ticks."""

    pid: int
    started: str


class MemoryCheck(Protocol):
    """Looks at one kind of memory. Called from any thread, as a driver may take its time."""

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


class GpuMemory:
    """Memory of the GPUs of this host.

    Args:
        ask: Returns what the driver keeps for processes of these numbers.
    """

    def __init__(self, ask: Callable[[Collection[int]], tuple[HeldMemory, ...]] = held_memory) -> None:
        self._ask = ask

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        ours = {process.pid for process in processes if not _was_replaced(process)}
        return tuple(
            f"process {each.pid} with {'memory' if each.used_bytes is None else format_bytes(each.used_bytes)}"
            f" of {each.uuid}"
            for each in sorted(self._ask(ours), key=lambda each: (each.pid, each.uuid))
        )


class AllMemory:
    """Memory of the host and of its GPUs."""

    def __init__(self, *checks: MemoryCheck) -> None:
        self._checks = checks or (HostMemory(), GpuMemory())

    def held(self, processes: Collection[ProcessId]) -> tuple[str, ...]:
        return tuple(words for check in self._checks for words in check.held(processes))


def identify(pids: Iterable[int]) -> set[ProcessId]:
    """Return those of ``pids`` that run now."""
    return {ProcessId(pid, found[1]) for pid in pids if (found := state_of(pid)) is not None}


def still_runs(process: ProcessId) -> bool:
    """Return whether it holds memory: a zombie does not."""
    found = state_of(process.pid)
    return found is not None and found[1] == process.started and found[0] not in "ZX"


def _was_replaced(process: ProcessId) -> bool:
    """Return whether another process has its number by now."""
    found = state_of(process.pid)
    return found is not None and found[1] != process.started


async def until_free(processes: Collection[ProcessId], check: MemoryCheck, *, deadline_s: float) -> tuple[str, ...]:
    """Wait until these processes hold nothing; return what they still hold after ``deadline_s``."""
    with suppress(TimeoutError):
        async with asyncio.timeout(deadline_s):
            while held := await asyncio.to_thread(check.held, processes):  # noqa: ASYNC110  nobody tells
                await asyncio.sleep(_POLL_S)
            return held
    return await asyncio.to_thread(check.held, processes)


@dataclass(frozen=True, slots=True)
class _Departure:
    device_ids: frozenset[str]
    processes: frozenset[ProcessId]


class Departed:
    """Engines that were killed while something of theirs was still there, by the devices that they ran on."""

    def __init__(self, check: MemoryCheck = AllMemory()) -> None:
        self._check = check
        self._known: list[_Departure] = []

    def note(self, device_ids: Iterable[str], processes: Iterable[ProcessId]) -> None:
        """Remember who ran there."""
        self._known.append(_Departure(frozenset(device_ids), frozenset(processes)))

    async def ensure_free(self, device_ids: Collection[str], *, deadline_s: float) -> None:
        """Return when nobody who has ended holds memory of these devices.

        Raises:
            EngineStartFailed: Somebody still does after ``deadline_s``; the message says who and how much.
        """
        there = [each for each in self._known if not each.device_ids.isdisjoint(device_ids)]
        processes = frozenset[ProcessId]().union(*(each.processes for each in there))
        held = await until_free(processes, self._check, deadline_s=deadline_s)
        if held:
            devices = ", ".join(sorted(frozenset[str]().union(*(each.device_ids for each in there))))
            raise EngineStartFailed(
                f"the memory of an engine that has ended is not free on {devices}: {', '.join(held)}"
            )
        self._known = [each for each in self._known if each not in there]
