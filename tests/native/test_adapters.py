"""LoRA adapters of the native engine: token for token what the merged model says, in mixed batches and over moves."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.errors import InvalidRequest
from engines.native.adapter import NativeEngine
from engines.protocol import GenerationRequest
from tests.support.adapters import generated, make_adapter, merged
from tests.support.native import collect, even, gpt2, llama, move, request, running
from tests.support.until import until

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
    streams = asyncio.create_task(said_by_all(engine))
    for stages in (4, 1, 8, 2):
        if engine.pipeline != even(stages):
            await move(engine, even(stages))
    assert await streams == expected


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
