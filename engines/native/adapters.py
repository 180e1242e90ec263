"""The LoRA adapters of the engine core: which there are, and how they come and go while steps run.

An adapter has a number that is never given again, so that nothing of one is taken for another's of the same name: KV
blocks that are kept for prompts to come, or steps under way. It comes once every worker has read it, and one that is
taken away goes when no sequence uses it any more. Its files are copied first (`engines.native.adapter_copy`).
"""

import asyncio
from collections.abc import Callable, Mapping
from itertools import count

from engines.errors import AdapterRefused, UnsupportedByEngine
from engines.native import messages as m
from engines.native.adapter_copy import AdapterCopy
from engines.native.lora_files import files_in
from engines.native.workers import WorkerPool


class Adapters:
    """Used on the core's event loop.

    Args:
        configured: Name and directory of those that every worker has from its fork on, by the numbers from 1 on.
        is_used: Whether a sequence, or a step that workers may still run, has the adapter of that number.
        too_large: Says why devices have no room for so many bytes of adapters each; empty: they have.
        fail: Ends the engine, with the reason.
    """

    def __init__(
        self,
        configured: tuple[tuple[str, str], ...],
        *,
        pool: WorkerPool,
        is_used: Callable[[int], bool],
        too_large: Callable[[int], str],
        fail: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._is_used = is_used
        self._too_large = too_large
        self._fail = fail
        self._directories = dict(configured)
        self._numbers = {name: number for number, (name, _) in enumerate(configured, 1)}
        self._next = count(len(configured) + 1)
        self._copies: dict[int, AdapterCopy] = {}  # by number: those that the workers have not from their fork
        self._bytes: dict[int, int] = {}  # by number, of those: what each worker's own copy takes
        self._leaving: set[int] = set()
        self._announced: set[str] = set()  # those that only requests of this daemon may still name
        self._waiting: dict[tuple[int, int], asyncio.Future[str]] = {}  # by worker and number

    @property
    def directories(self) -> Mapping[str, str]:
        """The directory of each that requests may name."""
        return {name: self._directories[name] for name in self._numbers}

    @property
    def bytes_of_each_worker(self) -> int:
        """What each worker has of its own. Those of its fork are one copy for all."""
        return sum(self._bytes.values())

    @property
    def bytes_that_stay(self) -> int:
        """The same without those that go as soon as no sequence uses them."""
        return sum(size for number, size in self._bytes.items() if number not in self._leaving)

    def number_of(self, name: str) -> int | None:
        """Return the number of an adapter, 0 for no name; None: there is no such adapter."""
        return self._numbers.get(name) if name else 0

    async def load(self, name: str, directory: str) -> None:
        """Have every worker read one more; return when requests may name it. All of them have it, or none.

        Raises:
            AdapterRefused: There is one of that name, or it cannot be read, or devices have no room for it.
        """
        if name in self._directories:
            raise AdapterRefused(f"adapter {name!r} is loaded already")
        self._directories[name] = directory
        number = next(self._next)
        if refusal := await self._load(number, name, directory):
            del self._directories[name]
            self._drop(number)
            raise AdapterRefused(refusal)
        self._numbers[name] = number

    async def _load(self, number: int, name: str, directory: str) -> str:
        """Return why it cannot be had; empty: every worker has it."""
        try:
            copy = AdapterCopy(files_in(name, directory))
            self._copies[number] = copy
            await copy.fill()
        except UnsupportedByEngine as error:
            return str(error)
        self._pool.keep_to_itself(copy.descriptors)
        workers = range(self._pool.size)
        loop = asyncio.get_running_loop()
        for worker in workers:
            self._waiting[worker, number] = loop.create_future()
            self._pool.send(worker, _message(number, copy, at_once=False))
        refusals = await asyncio.gather(*(self._waiting[worker, number] for worker in workers))
        if refusal := next(filter(None, refusals), ""):
            return refusal
        lack = self._too_large(self.bytes_of_each_worker)
        return lack and f"adapter {name!r} in {directory}: {lack}"

    def unload(self, name: str, *, when_adopted: bool = False) -> None:
        """Take no request for it any more; it goes once no sequence uses it.

        Args:
            when_adopted: Not now, but if another daemon takes this one's place.

        Raises:
            AdapterRefused: There is none of that name.
        """
        if name not in self._numbers:
            raise AdapterRefused(f"adapter {name!r} is not loaded")
        if when_adopted:
            self._announced.add(name)
            return
        number = self._numbers.pop(name)
        self._announced.discard(name)
        del self._directories[name]
        self._leaving.add(number)
        self.between_steps()

    def adopted(self) -> None:
        """Another daemon has taken the place of the one before, whose requests are gone."""
        for name in tuple(self._announced):
            self.unload(name)

    def between_steps(self) -> None:
        """Let go of those that were taken away and are not used any more."""
        for number in [each for each in self._leaving if not self._is_used(each)]:
            self._leaving.remove(number)
            self._drop(number)

    def on_report(self, report: m.AdapterLoaded) -> None:
        """Take in a worker's answer. One that took another's place must have what that had."""
        if report.number in self._copies and not report.refusal:
            self._bytes[report.number] = report.num_bytes
        waiting = self._waiting.pop((report.worker, report.number), None)
        if waiting is not None:
            waiting.set_result(report.refusal)
        elif report.refusal and report.number in self._copies:
            self._fail(f"worker {report.worker} was started again: {report.refusal}")

    def restarted(self, worker: int) -> None:
        """A worker's process is a new one: it reads what came after the fork of the core's workers, before all else."""
        for number, copy in self._copies.items():
            if copy.is_whole:
                self._pool.send(worker, _message(number, copy, at_once=True))

    def _drop(self, number: int) -> None:
        copy = self._copies.pop(number, None)
        if copy is not None:
            self._pool.forget(copy.descriptors)
            copy.close()
        self._bytes.pop(number, None)
        self._pool.send_all(m.DropAdapter(number=number))


def _message(number: int, copy: AdapterCopy, *, at_once: bool) -> m.LoadAdapter:
    files = copy.files
    return m.LoadAdapter(
        number=number,
        name=files.name,
        directory=files.directory,
        config=str(files.config),
        weights=str(files.weights),
        at_once=at_once,
    )
