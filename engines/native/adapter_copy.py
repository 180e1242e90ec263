"""A LoRA adapter's files as they were when it was loaded, in the core's memory.

Every worker reads from there, also one that is started again later: all of them have the same weights, whatever has
become of the directory by then, and a file that is cut off while it is mapped ends no worker.
"""

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Final

from engines.native.lora_files import AdapterFiles

_AT_ONCE_BYTES: Final = 1 << 20  # between two turns of the core's loop


class AdapterCopy:
    """Both files of one adapter. ``close`` gives the memory back, once no worker has them open."""

    def __init__(self, files: AdapterFiles) -> None:
        self._of = files
        self._descriptors: list[int] = []
        self.is_whole = False

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What no other process needs: workers open it by its path."""
        return tuple(self._descriptors)

    @property
    def files(self) -> AdapterFiles:
        """The files, for all processes of this user while this one lives."""
        config, weights = (Path(f"/proc/{os.getpid()}/fd/{each}") for each in self._descriptors)
        return replace(self._of, config=config, weights=weights)

    async def fill(self) -> None:
        """Copy both, in pieces between which the loop goes on.

        Raises:
            UnsupportedByEngine: They cannot be read, or have changed meanwhile.
        """
        read = (self._of.config, self._of.weights)
        try:
            before = [_state(file) for file in read]
            for file in read:
                self._descriptors.append(os.memfd_create(f"lora {file.name}"))
                await _copy(file, self._descriptors[-1])
            if [_state(file) for file in read] != before:
                raise self._of.refusal("its files have changed while they were read")
            self.is_whole = True
        except OSError as error:
            raise self._of.refusal(error) from error

    def close(self) -> None:
        """Let go of the copy. Idempotent."""
        while self._descriptors:
            os.close(self._descriptors.pop())


async def _copy(file: Path, target: int) -> None:
    source = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_WILLNEED)
        at = 0
        while copied := os.sendfile(target, source, at, _AT_ONCE_BYTES):
            at += copied
            await asyncio.sleep(0)
    finally:
        os.close(source)


def _state(file: Path) -> tuple[int, ...]:
    at = file.stat()
    return at.st_dev, at.st_ino, at.st_mtime_ns, at.st_size
