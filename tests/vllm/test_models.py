"""Moves with other parallelism and other features, each on a vLLM of its own.

A start takes a minute, so one of them is ended by its last test, the hard way: what follows from that is the same with
any model.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.errors import EngineDied, RefactoringRefused
from engines.vllm.adapter import VllmEngine
from tests.contract.contract_requests import request_of
from tests.support.vllm import devices, layout, llama, running
from tests.vllm.remains import processes_of, runs
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


@pytest.mark.long
async def test_lora_is_served_and_moves_are_refused_by_its_name() -> None:
    """In the gate ``test_internals.py`` has the refusal, without a start."""
    async with running(llama(), layout(4), ranks=2, args=("--enable-lora",)) as engine:
        assert not engine.capabilities.refactors_in_place
        assert len(await run_streams(engine, count=2, max_tokens=4)) == 2
        with pytest.raises(RefactoringRefused, match="not supported with LoRA"):
            await move(engine, layout(2))
        assert (await engine.check_refactor(layout(2))).needs_replica
