"""A child process that is spoken to in JSON lines on its standard streams, and ends when its standard input does."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import msgspec

from tests.bench.processes import ROOT

_LONGEST_LINE_BYTES = 64 << 20
_END_GRACE_S = 10.0
Answer = TypeVar("Answer")


class ChildFailed(Exception):
    """The child ended, or could not do what it was told."""


class Child(Generic[Answer]):
    """One command at a time, one answer each."""

    def __init__(self, process: asyncio.subprocess.Process, answer: type[Answer]) -> None:
        self._process = process
        self._decoder = msgspec.json.Decoder(answer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, command: msgspec.Struct) -> Answer:
        """Send a command and return the answer.

        Raises:
            ChildFailed: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            raise ChildFailed(f"process {self.pid} ended")
        return self._decoder.decode(line)


@asynccontextmanager
async def child(
    command: Sequence[str], answer: type[Answer], *, environment: Mapping[str, str]
) -> AsyncIterator[Child[Answer]]:
    """Run a program of this folder; it ends with the scope."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        limit=_LONGEST_LINE_BYTES,
    )
    try:
        yield Child(process, answer)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_GRACE_S)
        except TimeoutError:
            process.kill()
            await process.wait()
