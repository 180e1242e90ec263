"""Ways to serve the same model, made alike: each completes a batch of prompts and says how long it took."""

import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engines.native.adapter import NativeEngine
from tests.bench import direct
from tests.bench.child import Child, child
from tests.bench.daemon_process import daemon
from tests.bench.generate_messages import Generate, Generated
from tests.bench.http_client import HttpClient
from tests.bench.load_messages import Load
from tests.bench.program import EngineSetup, even
from tests.bench.stats import median
from tests.bench.vllm_server import vllm_server

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Tokens that came, and the time from the first request sent to the last token.

    ``first_s`` is the median over streams of the time to the first one, NaN where that is not seen.
    """

    tokens: int
    took_s: float
    first_s: float = math.nan


class Contestant(Protocol):
    """Something that completes prompts."""

    @property
    def name(self) -> str: ...

    async def turn(self, prompts: Prompts, *, max_tokens: int) -> Turn:
        """Complete all prompts at once, each to ``max_tokens``."""


class OverHttp:
    """A server that speaks OpenAI's protocol."""

    def __init__(self, name: str, client: HttpClient, url: str) -> None:
        self.name = name
        self._client = client
        self._url = url

    async def turn(self, prompts: Prompts, *, max_tokens: int) -> Turn:
        return _turn_of(await self._client.run(self._url, prompts, max_tokens=max_tokens))


class Direct:
    """The native engine in this process's hands."""

    def __init__(self, name: str, engine: NativeEngine) -> None:
        self.name = name
        self._engine = engine

    async def turn(self, prompts: Prompts, *, max_tokens: int) -> Turn:
        return _turn_of(await direct.complete(self._engine, prompts, max_tokens=max_tokens))


class Transformers:
    """transformers' generate, the whole batch at once, with a cache of the kind named (empty: the default)."""

    def __init__(self, name: str, process: Child[Generated], *, cache: str) -> None:
        self.name = name
        self._process = process
        self._cache = cache

    async def turn(self, prompts: Prompts, *, max_tokens: int) -> Turn:
        answer = await self._process.ask(Generate(prompts=prompts, max_tokens=max_tokens, cache=self._cache))
        return Turn(tokens=answer.tokens, took_s=answer.took_s)


Opening = Callable[[], AbstractAsyncContextManager[list[Contestant]]]


def flexpiped_http(name: str, client: HttpClient, model: Path, setup: EngineSetup, *, stages: int) -> Opening:
    """Return what opens a daemon with that many stages."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[list[Contestant]]:
        async with daemon(model, setup, stages=stages) as server:
            yield [OverHttp(name, client, server.url)]

    return opened


def flexpiped_direct(name: str, model: Path, setup: EngineSetup, *, stages: int) -> Opening:
    """Return what opens an engine with that many stages."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[list[Contestant]]:
        async with direct.running(direct.options_for(model, setup), even(stages)) as engine:
            yield [Direct(name, engine)]

    return opened


def vllm_http(name: str, client: HttpClient, python: Path, model: Path, *, threads: int, eager: bool) -> Opening:
    """Return what opens a vLLM server."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[list[Contestant]]:
        async with vllm_server(python, model, threads=threads, eager=eager) as url:
            yield [OverHttp(name, client, url)]

    return opened


def transformers_generate(names: dict[str, str], model: Path, *, threads: int) -> Opening:
    """Return what opens a process that generates; ``names`` says how its kinds of cache are called in tables."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[list[Contestant]]:
        command = [sys.executable, "-m", "tests.bench.generate", str(model), str(threads)]
        environment = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        async with child(command, Generated, environment=environment) as process:
            yield [Transformers(name, process, cache=cache) for name, cache in names.items()]

    return opened


def _turn_of(load: Load) -> Turn:
    firsts = [times[0] - load.started_s for times in load.times_s if times]
    return Turn(tokens=load.tokens, took_s=load.ended_s - load.started_s, first_s=median(firsts))
