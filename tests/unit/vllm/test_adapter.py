"""What the daemon does about vLLM's processes, with a fake vLLM made of real processes."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import EngineClosed, EngineDied, EngineStartFailed, InvalidRequest, UnsupportedByEngine
from engines.offers import OwnRoutes
from engines.protocol import FinishReason, GenerationRequest, SamplingParams
from engines.served.group import members_of
from engines.served.logs import LogLine
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.layout import pipeline_of
from tests.support.fake_vllm import fake_engine
from tests.support.until import until

pytestmark = pytest.mark.real_loop

NOTICED_S = 10.0  # a death is noticed at once; a hang would take a minute


def request(*, max_tokens: int = 5, generated: tuple[int, ...] = (), **params: object) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=max_tokens, engine_params=params, logprobs=True)
    return GenerationRequest(
        request_id="x", prompt_token_ids=(10, 11), sampling=sampling, generated_token_ids=generated
    )


async def tokens_of(engine: VllmEngine, wanted: GenerationRequest) -> list[int]:
    return [token async for chunk in engine.generate(wanted) for token in chunk.token_ids]


def silent(_message: str) -> None:
    pass


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[VllmEngine]:
    engine = fake_engine(tmp_path)
    await engine.start(on_progress=silent)
    yield engine
    await engine.close()


def assert_nothing_is_left(group: int, run_directory: Path, shared: str = "") -> None:
    assert members_of(group) == []
    assert not run_directory.exists()
    assert not shared or not (Path("/dev/shm") / shared).exists()


async def test_tokens_come_and_what_was_generated_is_prompt(engine: VllmEngine) -> None:
    chunks = [chunk async for chunk in engine.generate(request())]
    assert [token for chunk in chunks for token in chunk.token_ids] == [2, 3, 4, 5, 6]
    assert [value for chunk in chunks for value in chunk.logprobs] == [-0.5] * 5
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert await tokens_of(engine, request(generated=(2, 3))) == [4, 5, 6]
    complete = [chunk async for chunk in engine.generate(request(generated=(2, 3, 4, 5, 6)))]
    assert [(chunk.token_ids, chunk.finish_reason) for chunk in complete] == [((), FinishReason.LENGTH)]


async def test_its_own_routes_are_offered(engine: VllmEngine) -> None:
    assert isinstance(engine, OwnRoutes)
    assert engine.own_routes_socket == engine.run_directory / "http.sock"
    own = engine.capabilities.own_server
    assert own is not None
    assert {"tools", "n"} <= own.chat_parameters
    assert own.every_chat == ""


async def test_a_request_that_vllm_refuses(engine: VllmEngine) -> None:
    with pytest.raises(InvalidRequest, match="min_p is too high") as caught:
        await tokens_of(engine, request(min_p=2.0))
    assert caught.value.parameter == "min_p"


async def test_without_side_channels_stages_are_as_planned(engine: VllmEngine) -> None:
    (stage,) = await engine.stages()
    assert (stage.first_decoder, stage.end_decoder, stage.pids, stage.busy) == (0, 8, (), None)
    assert not engine.capabilities.refactors_in_place
    check = await engine.check_refactor(pipeline_of(device_ids=("cpu:0", "cpu:1"), cuts=(4,), num_decoders=8))
    assert check.sentences == ("it is a fake",)


async def test_progress_and_log_reach_the_daemon(tmp_path: Path) -> None:
    progress: list[str] = []
    lines: list[LogLine] = []
    engine = fake_engine(tmp_path)
    engine._on_log = lines.append
    await engine.start(on_progress=progress.append)
    assert progress[1:] == [
        "starting vLLM 0.32.0",
        "vLLM: reading the model's configuration",
        "vLLM: starting the server",
    ]
    assert LogLine(level="info", process="APIServer", message="Resolved architecture: Fake") in lines
    left = next(found[1] for line in lines if (found := re.search("left behind: (.+)", line.message)))
    assert (Path("/dev/shm") / left).exists()
    group, directory = engine.pids["api"], engine.run_directory

    await asyncio.gather(engine.close(), engine.close())

    assert_nothing_is_left(group, directory, left)
    with pytest.raises(EngineClosed):
        await engine.counters()


@pytest.mark.parametrize("victim", ["api", "core", "worker"])
async def test_the_death_of_any_process_ends_all_of_them(tmp_path: Path, victim: str) -> None:
    engine = fake_engine(tmp_path, behaviour="stuck")  # so that the stream is under way, however slow the machine is
    await engine.start(on_progress=silent)
    stream = asyncio.create_task(tokens_of(engine, request(max_tokens=50)))
    died = asyncio.create_task(engine.died())
    pids, directory = engine.pids, engine.run_directory
    await asyncio.sleep(0)
    started_s = time.monotonic()
    os.kill(pids["workers"][0] if victim == "worker" else pids[victim], signal.SIGKILL)
    reason = await died
    assert time.monotonic() - started_s < NOTICED_S
    assert {"api": "vLLM's API server", "core": "vLLM's engine core", "worker": "vLLM's worker of rank 0"}[
        victim
    ] in reason
    with pytest.raises(EngineDied):
        await stream
    with pytest.raises(EngineDied):
        await engine.counters()
    await until(lambda: members_of(pids["api"]) == [])
    await engine.close()
    assert_nothing_is_left(pids["api"], directory)


@pytest.mark.parametrize("behaviour", ["stuck", "deaf"])
async def test_a_hang_is_a_death(tmp_path: Path, behaviour: str) -> None:
    engine = fake_engine(tmp_path, behaviour=behaviour, hang_deadline_s=0.5)
    await engine.start(on_progress=silent)
    with pytest.raises(EngineDied, match="hung: work is pending and no step has finished"):
        await tokens_of(engine, request())
    assert "hung" in await engine.died()
    group, directory = engine.pids["api"], engine.run_directory
    await engine.close()
    assert_nothing_is_left(group, directory)


async def test_a_step_that_compiles_may_take_longer(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, behaviour="compiles", hang_deadline_s=1.0)
    await engine.start(on_progress=silent)
    assert await tokens_of(engine, request()) == [2, 3, 4, 5, 6]
    await engine.close()


async def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, behaviour="refuse")
    with pytest.raises(EngineStartFailed, match="exited with status 3: ValueError: this model is not one of ours"):
        await engine.start(on_progress=silent)
    assert not engine.run_directory.exists()


async def test_a_start_has_a_deadline(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, behaviour="silent", start_deadline_s=0.7)
    with pytest.raises(EngineStartFailed, match=r"not ready within 0\.7 s"):
        await engine.start(on_progress=silent)
    assert not engine.run_directory.exists()


async def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for options, words in (
        ({"args": ("--port", "1")}, "--port is not yours"),
        ({"device_ids": ("cpu:7",)}, "no rank on cpu:0"),
        ({"device_ids": ("cpu:0", "cpu:1")}, "the head stays on rank 1"),
    ):
        with pytest.raises(UnsupportedByEngine, match=words):
            await fake_engine(tmp_path, **options).start(on_progress=silent)


async def test_a_token_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match="cannot read the hub token"):
        await fake_engine(tmp_path, hf_token_file=str(tmp_path / "none")).start(on_progress=silent)


async def test_two_never_start_at_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    slow, second = fake_engine(tmp_path / "a", behaviour="silent"), fake_engine(tmp_path / "b")
    said: list[str] = []
    never_ready = asyncio.create_task(slow.start(on_progress=silent))
    await until(lambda: slow._server is not None)
    starting = asyncio.create_task(second.start(on_progress=said.append))
    await until(lambda: bool(said))
    assert second._server is None
    never_ready.cancel()
    with pytest.raises(asyncio.CancelledError):
        await never_ready
    await starting
    await second.close()


def test_a_killed_daemon_leaves_no_process(tmp_path: Path) -> None:
    daemon = (
        "import asyncio, pathlib, sys\n"
        "from tests.support.fake_vllm import fake_engine\n"
        "async def main():\n"
        "    engine = fake_engine(pathlib.Path(sys.argv[1]))\n"
        "    await engine.start(on_progress=lambda _: None)\n"
        "    print(engine.pids['api'], engine.run_directory, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(
        [sys.executable, "-c", daemon, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        api, directory = child.stdout.readline().split()
        child.kill()
    give_up_s = time.monotonic() + 60.0
    while Path(f"/proc/{api}").exists() and "Z" not in Path(f"/proc/{api}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < give_up_s
        time.sleep(0.02)
    for pid in members_of(int(api)):  # the fake's own children have no parent-death signal
        os.kill(pid, signal.SIGKILL)
    from engines.served.run_directory import sweep

    sweep(Path(directory).parent)
    assert not Path(directory).exists()


def test_options_have_defaults() -> None:
    assert VllmOptions(python="", model_directory="", device_ids=("a",), num_decoders=1, kv_bytes_per_token=1).env == {}
