"""Moves with other models and other parallelism, each on a vLLM of its own.

A start takes a minute, so two of them are ended by a last test each, the hard way: what follows from that is the same
with any model.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.errors import EngineDied, RefactoringRefused
from engines.vllm.adapter import VllmEngine
from tests.contract.engine_contract import request_of
from tests.support import checkpoints
from tests.support.native import CACHE
from tests.support.vllm import devices, layout, llama, running
from tests.vllm.remains import processes_of, runs, shared_memory
from tests.vllm.streams import assert_same, move, on_pairs, run_streams

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="module"),
]
HANG_DEADLINE_S = 8.0  # more than the two cores ever keep a process waiting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine_of_pairs() -> AsyncIterator[VllmEngine]:
    """TP 2 x PP 2."""
    options = {"tensor_parallel": 2, "device_ids": devices(2, tensor_parallel=2), "hang_deadline_s": HANG_DEADLINE_S}
    async with running(llama(), on_pairs(4), ranks=2, **options) as engine:
        yield engine


async def test_tensor_parallel_ranks_move_their_shares(engine_of_pairs: VllmEngine) -> None:
    """Each share goes to the rank of equal tensor-parallel index."""
    undisturbed = await run_streams(engine_of_pairs, count=4)
    streams = asyncio.create_task(run_streams(engine_of_pairs, count=4))
    for first in (2, 7, 8, 4):
        await move(engine_of_pairs, on_pairs(first))
    assert_same(await streams, undisturbed)


async def test_a_core_that_is_stopped_is_a_hang(engine_of_pairs: VllmEngine) -> None:
    """The last of that vLLM."""
    stream = engine_of_pairs.generate(request_of(max_tokens=1000))
    await anext(stream)
    os.kill(engine_of_pairs.pids["core"], signal.SIGSTOP)
    with pytest.raises(EngineDied, match="hung: work is pending and no step has finished"):
        async with asyncio.timeout(HANG_DEADLINE_S + 5.0):
            [chunk async for chunk in stream]
    await engine_of_pairs.close()
    assert [pid for pid in processes_of(engine_of_pairs) if runs(pid)] == []


async def test_gpt2_moves_with_its_learnt_positions_and_tied_head() -> None:
    """Another family: other names, biases, positions that are looked up, a head tied to the embedding."""
    model = checkpoints.make_gpt2(CACHE / "gpt2-heads-of-32", hidden_size=128)
    async with running(model, layout(3, num_decoders=6), ranks=2) as engine:
        undisturbed = await run_streams(engine, count=4)
        streams = asyncio.create_task(run_streams(engine, count=4))
        for cut in (1, 5, 3):
            await move(engine, layout(cut, num_decoders=6))
        assert_same(await streams, undisturbed)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine_with_lora() -> AsyncIterator[VllmEngine]:
    async with running(llama(), layout(4), ranks=2, args=("--enable-lora",)) as engine:
        yield engine


async def test_lora_is_served_and_moves_are_refused_by_its_name(engine_with_lora: VllmEngine) -> None:
    assert not engine_with_lora.capabilities.refactors_in_place
    assert len(await run_streams(engine_with_lora, count=2, max_tokens=4)) == 2
    with pytest.raises(RefactoringRefused, match="not supported with LoRA"):
        await move(engine_with_lora, layout(2))
    assert (await engine_with_lora.check_refactor(layout(2))).needs_replica


async def test_the_death_of_a_worker_is_noticed_and_nothing_is_left(engine_with_lora: VllmEngine) -> None:
    """The last of that vLLM."""
    engine = engine_with_lora
    directory, pids = engine.run_directory, processes_of(engine)
    shared = shared_memory(directory)
    assert shared
    assert all(path.exists() for path in shared)
    stream = engine.generate(request_of(max_tokens=1000))
    await anext(stream)
    started_s = time.monotonic()
    os.kill(engine.pids["workers"][1], signal.SIGKILL)
    reason = await engine.died()
    assert time.monotonic() - started_s < 2.0
    assert "worker of rank 1" in reason
    with pytest.raises(EngineDied):
        [chunk async for chunk in stream]
    await engine.close()
    assert [pid for pid in pids if runs(pid)] == []
    assert [path for path in shared if path.exists()] == []
    assert not directory.exists()
