"""The load generator, a process of its own: ``python -m tests.bench.client`` obeys JSON lines on standard input.

It does as little as it can for each token, as it shares the cores with the server that it measures.
"""

import asyncio
import sys
import time
from urllib.parse import urlsplit

import msgspec
import uvloop

from tests.bench.load_messages import Command, Hold, Load, Prompt, Run, Stop, Take
from tests.bench.sse import SseStream, StreamFailed, request_bytes

_WARM_DEADLINE_S = 60.0
_LONGEST_LINE_BYTES = 64 << 20


class Client:
    """Obeys one command after the other; streams of ``Hold`` go on meanwhile."""

    def __init__(self) -> None:
        self._times_s: list[list[float]] = []
        self._held: list[asyncio.Task[None]] = []
        self._tokens = 0
        self._restarts = 0
        self._started_s = 0.0

    async def obey(self, command: Command) -> Load:
        """Return the answer to a command."""
        try:
            match command:
                case Run():
                    return await self._run(command)
                case Hold():
                    return await self._hold(command)
                case Take():
                    self._raise_failures()
                    return self._take()
                case Stop():
                    return await self._stop()
        except ExceptionGroup as group:  # of the streams of Run
            return Load(error=str(group.exceptions[0]))
        except (StreamFailed, OSError, TimeoutError) as error:
            return Load(error=f"{type(error).__name__}: {error}")

    async def _run(self, command: Run) -> Load:
        self._begin(len(command.prompts))
        async with asyncio.TaskGroup() as group:
            for prompt, times in zip(command.prompts, self._times_s, strict=True):
                group.create_task(self._complete(command, prompt, times))
        return self._take()

    async def _hold(self, command: Hold) -> Load:
        self._begin(len(command.prompts))
        for prompt, times in zip(command.prompts, self._times_s, strict=True):
            self._held.append(asyncio.create_task(self._repeat(command, prompt, times)))
        async with asyncio.timeout(_WARM_DEADLINE_S):
            while any(len(times) < command.warm_events for times in self._times_s):
                self._raise_failures()
                await asyncio.sleep(0.01)
        return self._take()

    async def _stop(self) -> Load:
        for task in self._held:
            task.cancel()
        await asyncio.gather(*self._held, return_exceptions=True)
        self._held.clear()
        return self._take()

    async def _repeat(self, command: Hold, prompt: Prompt, times: list[float]) -> None:
        while True:
            await self._complete(command, prompt, times)
            self._restarts += 1

    async def _complete(self, command: Run | Hold, prompt: Prompt, times: list[float]) -> None:
        address = urlsplit(command.url)
        assert address.hostname is not None
        assert address.port is not None
        raw = request_bytes(host=address.netloc, model=command.model, prompt=prompt, max_tokens=command.max_tokens)
        _, stream = await asyncio.get_running_loop().create_connection(
            lambda: SseStream(raw, times), address.hostname, address.port
        )
        try:
            tokens = await stream.done
            self._tokens += tokens
        finally:
            stream.hang_up()

    def _begin(self, count: int) -> None:
        self._times_s = [[] for _ in range(count)]
        self._tokens = self._restarts = 0
        self._started_s = time.monotonic()

    def _take(self) -> Load:
        load = Load(
            tokens=self._tokens,
            started_s=self._started_s,
            ended_s=time.monotonic(),
            times_s=[list(times) for times in self._times_s],
            cpu_s=time.process_time(),
            restarts=self._restarts,
        )
        for times in self._times_s:
            times.clear()
        return load

    def _raise_failures(self) -> None:
        for task in self._held:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error


async def _serve(commands: asyncio.StreamReader) -> None:
    client = Client()
    decode = msgspec.json.Decoder(Command).decode
    while line := await commands.readline():
        answer = await client.obey(decode(line))
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


async def _main() -> None:
    commands = asyncio.StreamReader(limit=_LONGEST_LINE_BYTES)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    await _serve(commands)


if __name__ == "__main__":
    uvloop.run(_main())
