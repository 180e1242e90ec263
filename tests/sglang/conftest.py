"""One SGLang of two pipeline ranks for many tests: it boots once, and once more when one of them kills it."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from engines.parameters.keeper import ParameterKeeper
from engines.served.logs import LogLine
from engines.sglang.adapter import SglangEngine
from tests.support.order import put_sharers_last
from tests.support.sglang import running
from tests.support.vllm import layout, llama
from topology.units import MIB

TOOLS = ("--tool-call-parser", "qwen25")
ENV = {"SGLANG_LOG_MS": "true"}  # as a user has it in engines.sglang.env


@dataclass(kw_only=True)
class Shared:
    """What the tests share. One that replaces the engine puts its successor here."""

    engine: SglangEngine
    log: list[LogLine] = field(default_factory=list)  # all that the first engine has said


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put those that share this SGLang after those that boot others, and last the one that closes it."""
    put_sharers_last(items, Path(__file__).parent, shared="shared", ends="disposable_engine")


# Not of the session: else it would stay beside the engines of other packages.
@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def keeper() -> AsyncIterator[ParameterKeeper]:
    """Keeps layers of this SGLang in the memory of the host."""
    keeper = ParameterKeeper(64 * MIB)
    async with keeper.serving():
        yield keeper


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def shared(keeper: ParameterKeeper) -> AsyncIterator[Shared]:
    log: list[LogLine] = []
    kept = {"parameters": keeper.address}
    async with running(llama(), layout(4), ranks=2, args=TOOLS, env=ENV, on_log=log.append, **kept) as engine:
        shared = Shared(engine=engine, log=log)
        yield shared
        await shared.engine.close()


@pytest.fixture
def engine(shared: Shared) -> SglangEngine:
    """The engine of all, which each test leaves idle."""
    return shared.engine
