"""The benchmark's side of the client process."""

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from tests.bench.child import Child, ChildFailed, child
from tests.bench.load_messages import Command, Hold, Load, Prompt, Run, Stop, Take


class HttpClient:
    """Makes the client process send load to a server."""

    def __init__(self, process: Child[Load]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, url: str, prompts: Sequence[Prompt], *, max_tokens: int) -> Load:
        """Complete all prompts at once. Raises: ChildFailed, when a stream fails."""
        return await self._ask(Run(url=url, model="bench", prompts=prompts, max_tokens=max_tokens))

    async def hold(self, url: str, prompts: list[list[int]], *, max_tokens: int, warm_events: int) -> None:
        """Keep streams going until ``stop``. Raises: ChildFailed, when a stream fails."""
        await self._ask(Hold(url=url, model="bench", prompts=prompts, max_tokens=max_tokens, warm_events=warm_events))

    async def take(self) -> Load:
        """Return what came since the last call. Raises: ChildFailed, when a stream failed meanwhile."""
        return await self._ask(Take())

    async def stop(self) -> None:
        """Hang up."""
        await self._ask(Stop())

    async def _ask(self, command: Command) -> Load:
        answer = await self._process.ask(command)
        if answer.error:
            raise ChildFailed(answer.error)
        return answer


@asynccontextmanager
async def http_client() -> AsyncIterator[HttpClient]:
    """Start the client process; it ends with the scope."""
    async with child([sys.executable, "-m", "tests.bench.client"], Load, environment={}) as process:
        yield HttpClient(process)
