"""A server that a benchmark has started ends with it, however that ends."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engines.served.group import process_ended
from tests.bench.processes import ROOT, descendants, leashed
from tests.support.until import until

pytestmark = pytest.mark.real_loop
ENDED_S = 30.0
BENCHMARK = """
import asyncio, sys
from pathlib import Path
from tests.bench.processes import leashed
from tests.bench.program import run

async def main():
    folder = Path(sys.argv[1])
    async with leashed(["sleep", "999"], environment={}, folder=folder, log=folder / "log"):
        print("up", flush=True)
        await asyncio.sleep(999)

run(main)
"""


async def server_of(leash: int) -> int:
    await until(lambda: bool(descendants(leash)))
    return descendants(leash)[0]


@asynccontextmanager
async def leash_of(folder: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    async with leashed(command, environment={}, folder=folder, log=folder / "log") as leash:
        yield leash


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
async def test_a_server_ends_with_its_leash(tmp_path: Path, number: int) -> None:
    async with leash_of(tmp_path, "sleep", "999") as leash:
        server = await server_of(leash.pid)
        os.kill(leash.pid, number)
        await asyncio.wait_for(process_ended(server), ENDED_S)


async def test_an_interrupt_of_the_terminal_is_for_the_benchmark(tmp_path: Path) -> None:
    async with leash_of(tmp_path, "sleep", "999") as leash:
        server = await server_of(leash.pid)
        os.kill(leash.pid, signal.SIGINT)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process_ended(server), 0.2)
    await asyncio.wait_for(process_ended(server), ENDED_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
async def test_no_server_outlives_a_benchmark_whose_process_group_is_ended(tmp_path: Path, number: int) -> None:
    """As ``timeout`` ends one, or a terminal."""
    benchmark = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BENCHMARK, str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert benchmark.stdout is not None
    assert await benchmark.stdout.readline() == b"up\n"
    (leash,) = descendants(benchmark.pid)[:1]
    server = await server_of(leash)
    os.killpg(benchmark.pid, number)
    await asyncio.wait_for(process_ended(server), ENDED_S)
    assert await benchmark.wait() in (130, -number)
