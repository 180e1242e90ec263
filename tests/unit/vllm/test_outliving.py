"""An engine with a server of its own outlives its daemon and is taken by the next: a fake vLLM of real processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import EngineStartFailed
from engines.found_process import FoundProcess, start_of
from engines.launching import CoreProcess, OwnPlace
from engines.outliving import NotAdopted, Outliving, at
from engines.protocol import GenerationRequest, SamplingParams
from engines.records import EngineRecord, read_record
from engines.served.adopting import AdoptedServer, adopt, ensure_agreed
from engines.served.group import members_of
from engines.served.hosting import InKeeping
from engines.vllm.adapter import VllmEngine
from tests.support.fake_vllm import ONE, fake_engine, fake_interpreter
from tests.support.until import until
from tests.unit.engines.test_records import PURPOSE
from tests.unit.engines.test_unit_launcher import AS_SYSTEMD, ROOT

pytestmark = pytest.mark.real_loop

REQUEST = GenerationRequest(
    request_id="x", prompt_token_ids=(10, 11), sampling=SamplingParams(max_tokens=3, logprobs=True)
)


BEGUN: list[CoreProcess] = []  # keepers of a test, which are children of this process


def outliving_in(folder: Path, *, adopt_within_s: float = 60.0, is_leaving: bool = True) -> Outliving:
    return Outliving(
        purpose=PURPOSE,
        name="m",
        place=OwnPlace(socket=folder / "e" / "one.sock", log=folder / "e" / "one.log", launcher=None),
        record=folder / "one.json",
        adopt_within_s=adopt_within_s,
        flexpiped="0",
        leaving=lambda: is_leaving,
    )


async def begun(folder: Path, *, adopt_within_s: float = 60.0) -> VllmEngine:
    engine = fake_engine(folder, outliving=outliving_in(folder, adopt_within_s=adopt_within_s))
    await engine.start(on_progress=lambda _message: None)
    assert engine._server is not None
    assert isinstance(engine._server._hosted, InKeeping)
    BEGUN.append(engine._server._hosted.keeper)
    return engine


@pytest_asyncio.fixture
async def folder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Path]:
    """Where the engine is noted, by a name that leaves room for sockets; one that a test leaves is ended."""
    folder = tmp_path_factory.mktemp("o")
    yield folder
    if (file := folder / "one.json").exists():
        keeper = read_record(file).pid
        with suppress(ProcessLookupError):
            os.kill(keeper, signal.SIGTERM)
        await until(lambda: start_of(keeper) == "")
    for child in BEGUN:
        await child.ended()  # or asyncio does not know
    BEGUN.clear()


@pytest_asyncio.fixture
async def left(folder: Path) -> AsyncIterator[VllmEngine]:
    """An engine whose daemon has gone."""
    engine = await begun(folder)
    await engine.close()
    yield engine


async def adopted_in(folder: Path, *, is_leaving: bool = True) -> AdoptedServer:
    record: EngineRecord = read_record(folder / "one.json")
    process = FoundProcess.hold(record.pid, start=record.start)
    assert process is not None
    outliving = at(
        outliving_in(folder, is_leaving=is_leaving), record=folder / "one.json", socket_path=Path(record.socket)
    )
    return await adopt(record, process, outliving)


async def tokens_of(engine: VllmEngine) -> list[int]:
    return [token async for chunk in engine.generate(REQUEST) for token in chunk.token_ids]


async def test_the_next_one_goes_on_with_the_same_processes_and_ends_them(left: VllmEngine, folder: Path) -> None:
    pids, directory = left.pids, left.run_directory
    members = members_of(pids["api"])
    assert {pids["api"], pids["core"], *pids["workers"]} <= set(members)
    assert (folder / "one.json").stat().st_mode & 0o777 == 0o600
    assert (directory / "owner").read_text().split()[0] == str(read_record(folder / "one.json").pid)

    second = fake_engine(folder, outliving=await adopted_in(folder))
    await second.start(on_progress=lambda _message: None)
    assert (second.is_adopted, second.pids, second.pipeline, second.epoch) == (True, pids, ONE, 0)
    assert members_of(pids["api"]) == members
    assert await tokens_of(second) == [2, 3, 4]
    await second.close()  # and once more left
    third = fake_engine(folder, outliving=await adopted_in(folder, is_leaving=False))
    await third.start(on_progress=lambda _message: None)
    assert await tokens_of(third) == [2, 3, 4]
    await third.close()

    assert members_of(pids["api"]) == []
    assert not directory.exists()
    assert not (folder / "one.json").exists()


async def test_what_it_writes_reaches_the_daemon_and_its_death_is_known(left: VllmEngine, folder: Path) -> None:
    lines: list[str] = []
    engine = fake_engine(folder, outliving=await adopted_in(folder))
    engine._on_log = lambda line: lines.append(line.message)
    await engine.start(on_progress=lambda _message: None)
    os.kill(engine.pids["api"], signal.SIGKILL)
    assert "vLLM's API server" in await engine.died()
    await engine.close()
    assert not (folder / "one.json").exists()
    assert not left.run_directory.exists()


async def test_nobody_comes_so_all_of_it_ends(folder: Path) -> None:
    engine = await begun(folder, adopt_within_s=0.2)
    await engine.close()
    await until(lambda: members_of(engine.pids["api"]) == [])
    await until(lambda: start_of(read_record(folder / "one.json").pid) == "")
    assert not engine.run_directory.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_end_of_its_keeper_ends_it(left: VllmEngine, folder: Path, number: signal.Signals) -> None:
    api, core = left.pids["api"], left.pids["core"]
    os.kill(read_record(folder / "one.json").pid, number)
    await until(lambda: start_of(api) == "")
    if number is signal.SIGTERM:
        await until(lambda: members_of(api) == [])
    else:  # the fake's own children have no parent-death signal
        os.kill(core, signal.SIGKILL)
        for pid in members_of(api):
            os.kill(pid, signal.SIGKILL)


async def test_an_engine_whose_environment_was_upgraded_is_not_gone_on_with(left: VllmEngine, folder: Path) -> None:
    second = fake_engine(folder, outliving=await adopted_in(folder))
    fake_interpreter(folder, version="0.33.0")
    with pytest.raises(EngineStartFailed, match=r"vLLM 0\.32\.0 runs, and its environment has 0\.33\.0 now"):
        await second.start(on_progress=lambda _message: None)
    await until(lambda: members_of(left.pids["api"]) == [])


async def test_an_engine_without_its_environment_is_ended(left: VllmEngine, folder: Path) -> None:
    (folder / "python").rename(folder / "elsewhere")
    second = fake_engine(folder, outliving=await adopted_in(folder), python=str(folder / "python"))
    (folder / "python").unlink()
    with pytest.raises(EngineStartFailed, match="there is no"):
        await second.start(on_progress=lambda _message: None)
    await until(lambda: members_of(left.pids["api"]) == [])


async def test_one_that_does_not_start_leaves_nothing(folder: Path) -> None:
    engine = fake_engine(folder, behaviour="refuse", outliving=outliving_in(folder))
    with pytest.raises(EngineStartFailed, match="this model is not one of ours"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()
    assert list((folder / "e").glob("one.*")) == []
    assert not (folder / "one.json").exists()


def begin_as_systemd(listening: socket.socket, started: list[subprocess.Popen[bytes]]) -> None:
    """Begin a unit for one connection, as ``flexpiped-engine.socket`` has systemd do."""
    connection, _ = listening.accept()
    with connection:
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(connection.fileno())],
            pass_fds=[connection.fileno()],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    started.append(process)


async def test_in_a_unit_of_its_own_its_run_directory_is_where_daemons_see_it(folder: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(folder / "launcher.sock"))
        listening.listen()
        starting = asyncio.to_thread(begin_as_systemd, listening, started)
        outliving = outliving_in(folder)
        place = replace(outliving.place, launcher=folder / "launcher.sock", runs=folder / "run")
        engine = fake_engine(folder, outliving=replace(outliving, place=place))
        await asyncio.gather(starting, engine.start(on_progress=lambda _message: None))
    [unit] = started
    assert engine.run_directory.parent == folder / "run"
    assert read_record(folder / "one.json").pid == unit.pid
    await engine.close()

    second = fake_engine(folder, outliving=await adopted_in(folder, is_leaving=False))
    await second.start(on_progress=lambda _message: None)
    assert await tokens_of(second) == [2, 3, 4]
    await second.close()
    assert await asyncio.to_thread(unit.wait) == 0
    assert list((folder / "run").iterdir()) == []


async def test_an_interpreter_that_cannot_be_run_is_told_by_the_keeper(folder: Path) -> None:
    engine = fake_engine(folder, outliving=outliving_in(folder))
    (folder / "python").write_text('#!/bin/sh\nrm "$0"\necho vllm 0.32.0\n')  # it is there once
    with pytest.raises(EngineStartFailed, match=r"cannot run .*: No such file"):
        await engine.start(on_progress=lambda _message: None)
    assert list((folder / "e").glob("one.*")) == []


def test_ranks_that_hold_other_layers_than_the_engine_says_are_not_adopted() -> None:
    ensure_agreed(1, {"layers": [3, 2]}, layout=(0, 0, 1, 1))
    with pytest.raises(NotAdopted, match=r"one of stage 0 holds layers \[0\], not \[0, 1\]"):
        ensure_agreed(0, {"layers": [0]}, layout=(0, 0, 1, 1))
