"""LoRA adapters of the native engine: token for token what the merged model says, in mixed batches and over moves."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.checkpoint import open_checkpoint
from engines.errors import AdapterRefused, InvalidRequest
from engines.native.adapter import NativeEngine
from engines.protocol import GenerationRequest
from planner.memory import KvBudget, check_memory
from planner.model_graph import build_model_graph
from tests.support.adapters import generated, make_adapter, merged
from tests.support.native import collect, even, gpt2, llama, move, moved_under, options_for, request, running
from tests.support.until import until
from topology.device import cpu_devices

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="module")]

PROMPT = tuple(range(20, 57))
NEW_TOKENS = 40
TARGETS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "everything": ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
}
NAMES = ("", *TARGETS)
Expected = dict[str, list[int]]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(folder / name, of=llama(), seed=seed, targets=targets)
        for seed, (name, targets) in enumerate(TARGETS.items())
    }


@pytest.fixture(scope="module")
def expected(adapters: dict[str, Path]) -> Expected:
    """Return what transformers says: without an adapter, and with each of them merged."""
    said = {name: generated(merged(llama(), adapters.get(name)), PROMPT, max_tokens=NEW_TOKENS) for name in NAMES}
    assert len({tuple(tokens) for tokens in said.values()}) == len(NAMES)
    return said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(adapters: dict[str, Path]) -> AsyncIterator[NativeEngine]:
    given = tuple((name, str(directory)) for name, directory in adapters.items())
    async with running(llama(), even(1), adapters=given) as engine:
        assert engine.capabilities.adapters == tuple(TARGETS)
        yield engine


def wanted(name: str) -> GenerationRequest:
    return request(PROMPT, max_tokens=NEW_TOKENS, adapter=name)


async def said_by_all(engine: NativeEngine) -> Expected:
    """Ask with and without, at once: they are in the same micro-batches."""
    answers = await asyncio.gather(*(collect(engine, wanted(name)) for name in NAMES))
    return {name: tokens for name, (tokens, _) in zip(NAMES, answers, strict=True)}


@pytest.mark.parametrize("stages", [1, 2, 8])
async def test_each_says_what_the_merged_model_says_alone_and_together(
    engine: NativeEngine, expected: Expected, stages: int
) -> None:
    """The prompt is the same for all: what one leaves in the prefix cache is not found by another."""
    if engine.pipeline != even(stages):
        await move(engine, even(stages))
    for name in NAMES:
        assert (await collect(engine, wanted(name)))[0] == expected[name]
    assert await said_by_all(engine) == expected


async def test_they_go_along_with_their_layers_under_running_streams(engine: NativeEngine, expected: Expected) -> None:
    targets = [even(stages) for stages in (4, 1, 8, 2)]
    for said in await moved_under(engine, targets, lambda: said_by_all(engine)):
        assert said == expected


async def test_a_stage_worker_that_takes_anothers_place_has_them(engine: NativeEngine, expected: Expected) -> None:
    restarts = (await engine.counters()).worker_restarts_total
    streams = asyncio.create_task(said_by_all(engine))

    async def are_under_way() -> bool:
        return (await engine.counters()).running == len(NAMES)

    await until(are_under_way, timeout_s=60.0)
    os.kill((await engine.stages())[0].pids[0], signal.SIGKILL)
    assert await streams == expected
    assert (await engine.counters()).worker_restarts_total == restarts + 1


async def test_one_that_is_not_there_is_refused_by_name(engine: NativeEngine) -> None:
    with pytest.raises(InvalidRequest, match="model"):
        await collect(engine, wanted("another"))


@pytest.mark.long
async def test_linear_modules_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2 has them."""
    adapter = make_adapter(tmp_path / "a", of=gpt2(), seed=3, targets=("c_attn", "c_fc", "c_proj"))
    expected = generated(merged(gpt2(), adapter), PROMPT, max_tokens=NEW_TOKENS)
    async with running(gpt2(), even(2, 6), adapters=(("a", str(adapter)),)) as engine:
        assert (await collect(engine, wanted("a")))[0] == expected


# --- while serving ---


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two more, which are not configured."""
    folder = tmp_path_factory.mktemp("late")
    first = make_adapter(folder / "first", of=llama(), seed=11, targets=("o_proj", "up_proj"))
    return first, make_adapter(folder / "second", of=llama(), seed=12, targets=("o_proj", "up_proj"))


@pytest.fixture(scope="module")
def expected_late(late: tuple[Path, Path]) -> list[list[int]]:
    """Return what transformers says with each of them merged."""
    return [generated(merged(llama(), each), PROMPT, max_tokens=NEW_TOKENS) for each in late]


async def test_one_comes_and_goes_while_streams_run_and_another_gets_its_name(
    engine: NativeEngine, expected: Expected, late: tuple[Path, Path], expected_late: list[list[int]]
) -> None:
    """The prompt stays the same: what the first has left in the prefix cache is not found for the second."""
    first, second = late
    streams = asyncio.create_task(said_by_all(engine))
    await engine.load_adapter("late", str(first))
    assert engine.capabilities.adapters == (*TARGETS, "late")
    assert (await collect(engine, wanted("late")))[0] == expected_late[0]
    assert await streams == expected

    await engine.unload_adapter("late")
    assert engine.capabilities.adapters == tuple(TARGETS)
    with pytest.raises(InvalidRequest, match="model"):
        await collect(engine, wanted("late"))
    await engine.load_adapter("late", str(second))
    assert (await collect(engine, wanted("late")))[0] == expected_late[1]
    await engine.unload_adapter("late")


async def test_one_that_came_goes_along_with_layers_and_into_a_worker_that_is_started_again(
    engine: NativeEngine, late: tuple[Path, Path], expected_late: list[list[int]]
) -> None:
    await engine.load_adapter("late", str(late[0]))
    targets = [even(stages) for stages in (4, 1, 2)]
    for tokens, _ in await moved_under(engine, targets, lambda: collect(engine, wanted("late"))):
        assert tokens == expected_late[0]
    restarts = (await engine.counters()).worker_restarts_total
    for stage in await engine.stages():
        os.kill(stage.pids[0], signal.SIGKILL)

    async def are_back() -> bool:
        return (await engine.counters()).worker_restarts_total == restarts + 2

    await until(are_back, timeout_s=60.0)
    assert (await collect(engine, wanted("late")))[0] == expected_late[0]
    await move(engine, even(8))
    assert (await collect(engine, wanted("late")))[0] == expected_late[0]
    await engine.unload_adapter("late")


@pytest.mark.parametrize("becomes", ["another", "gone"])
async def test_every_worker_has_what_was_loaded_whatever_becomes_of_the_directory(
    engine: NativeEngine, late: tuple[Path, Path], expected_late: list[list[int]], tmp_path: Path, becomes: str
) -> None:
    """Also those that are started again: one that has no stage, and joins the stream later, and one that has."""
    directory = Path(shutil.copytree(late[0], tmp_path / "a"))
    await move(engine, even(2 if engine.pipeline != even(2) else 4))
    await engine.load_adapter("late", str(directory))
    if becomes == "gone":
        shutil.rmtree(directory)
    else:  # the same files are written over
        shutil.copytree(late[1], directory, dirs_exist_ok=True)
    restarts = (await engine.counters()).worker_restarts_total
    stages = await engine.stages()
    idle = next(pid for pid in reversed(engine.worker_pids) if pid not in {stage.pids[0] for stage in stages})
    os.kill(idle, signal.SIGKILL)
    os.kill(stages[0].pids[0], signal.SIGKILL)

    async def are_back() -> bool:
        return (await engine.counters()).worker_restarts_total == restarts + 2

    await until(are_back, timeout_s=60.0)
    await collect(engine, wanted(""))  # until the stage is back nothing moves
    for tokens, _ in await moved_under(engine, [even(8)], lambda: collect(engine, wanted("late"))):
        assert tokens == expected_late[0]
    await engine.stages()
    assert not [link for pid in engine.worker_pids for link in open_files(pid) if "lora" in link]
    await engine.unload_adapter("late")
    assert not [link for link in open_files(engine.core_pid) if "lora" in link]


def open_files(pid: int) -> list[str]:
    """Return what a process has open."""
    return [str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.mark.parametrize("action", ["raise", "kill"])
async def test_all_workers_have_it_or_none(
    engine: NativeEngine, late: tuple[Path, Path], expected_late: list[list[int]], action: str
) -> None:
    """What one of them refuses is refused and leaves nothing behind; one that dies over it is started again."""
    engine.arm_failpoint("worker.adapter", action, worker=5)
    if action == "raise":
        with pytest.raises(AdapterRefused, match=r"failpoint worker\.adapter"):
            await engine.load_adapter("late", str(late[0]))
        assert (engine.capabilities.adapters, engine.adapter_bytes) == (tuple(TARGETS), 0)
    await engine.load_adapter("late", str(late[1]))
    assert (await collect(engine, wanted("late")))[0] == expected_late[1]
    await engine.unload_adapter("late")


async def test_one_whose_caller_has_left_is_there_all_the_same(engine: NativeEngine, late: tuple[Path, Path]) -> None:
    loading = asyncio.create_task(engine.load_adapter("late", str(late[0])))
    await asyncio.sleep(0)
    loading.cancel()
    await until(lambda: "late" in engine.capabilities.adapters, timeout_s=60.0)
    assert loading.cancelled()
    await engine.unload_adapter("late")


async def test_one_goes_only_when_no_stage_may_run_a_step_with_it(
    engine: NativeEngine, late: tuple[Path, Path]
) -> None:
    """A step waits at the last stage when the first is lost; its sequence ends, its adapter goes, and then it runs."""
    await move(engine, even(3))
    await engine.load_adapter("late", str(late[0]))
    restarts = (await engine.counters()).worker_restarts_total
    stream = asyncio.create_task(collect(engine, request(PROMPT, max_tokens=400, adapter="late")))

    async def is_under_way() -> bool:
        return (await engine.counters()).running == 1

    await until(is_under_way, timeout_s=60.0)
    first, second, _ = (stage.pids[0] for stage in await engine.stages())
    os.kill(second, signal.SIGSTOP)
    await asyncio.sleep(0.1)  # the step gets there
    os.kill(first, signal.SIGKILL)

    async def is_lost() -> bool:
        return (await engine.counters()).worker_restarts_total > restarts

    await until(is_lost, timeout_s=60.0)
    stream.cancel()
    await asyncio.wait([stream])
    await engine.unload_adapter("late")
    os.kill(second, signal.SIGCONT)
    await collect(engine, wanted(""))
    assert (await engine.counters()).worker_restarts_total == restarts + 1


async def test_what_adapters_take_of_every_device_is_counted_before_layers_move(late: tuple[Path, Path]) -> None:
    """Of two stages the second fits beside the first to the byte, until an adapter comes.

    Where they are one, none can come.
    """
    async with running(llama(), even(2), device_memory_bytes=whole_on_one_device()) as engine:
        assert (await engine.check_refactor(even(1))).feasible
        await engine.load_adapter("late", str(late[0]))
        check = await engine.check_refactor(even(1))
        assert not check.feasible
        assert "too few" in check.sentences[0]
        assert engine.adapter_bytes > 0
        await engine.unload_adapter("late")
        assert engine.adapter_bytes == 0
        assert (await engine.check_refactor(even(1))).feasible
        await move(engine, even(1))
        with pytest.raises(AdapterRefused, match="too few"):
            await engine.load_adapter("late", str(late[0]))
        assert (engine.adapter_bytes, engine.capabilities.adapters) == (0, ())


def whole_on_one_device() -> int:
    """Return the bytes of all layers with their KV cache."""
    options, checkpoint = options_for(llama()), open_checkpoint(llama())
    graph = build_model_graph(checkpoint.config, checkpoint.tensors, dtype="float32")
    blocks = options.kv_cache_bytes // (graph.kv_bytes_per_token * options.kv_block_tokens)
    kv = KvBudget(block_tokens=options.kv_block_tokens, capacity_blocks=blocks)
    devices = cpu_devices(count=2, memory_bytes=1 << 40)
    first = check_memory(graph=graph, current=even(2), target=even(1), devices=devices, kv=kv).devices[0]
    return first.held_bytes + first.needed_bytes


async def test_a_stream_finishes_with_one_that_is_taken_away(
    engine: NativeEngine, late: tuple[Path, Path], expected_late: list[list[int]]
) -> None:
    await engine.load_adapter("late", str(late[0]))
    tokens: list[int] = []
    async for chunk in engine.generate(wanted("late")):
        if not tokens:
            await engine.unload_adapter("late")
        tokens += chunk.token_ids
    assert tokens == expected_late[0]
    assert engine.adapter_bytes == 0  # as soon as no request may name it


async def test_what_cannot_be_read_is_refused_and_changes_nothing(
    engine: NativeEngine, expected: Expected, tmp_path: Path
) -> None:
    of_another = make_adapter(tmp_path / "a", of=gpt2(), seed=3, targets=("c_attn",))
    for name, directory, words in (
        ("late", tmp_path / "nothing", "there is no such directory"),
        ("late", of_another, "not supported"),
        ("attention", of_another, "loaded already"),
    ):
        with pytest.raises(AdapterRefused, match=words):
            await engine.load_adapter(name, str(directory))
    with pytest.raises(AdapterRefused, match="not loaded"):
        await engine.unload_adapter("late")
    assert engine.capabilities.adapters == tuple(TARGETS)
    assert (await collect(engine, wanted("attention")))[0] == expected["attention"]
