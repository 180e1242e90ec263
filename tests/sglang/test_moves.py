"""Layers move in SGLang as the daemon has it: adapter, handovers and plugin together. See ``test_plugin_moves.py``."""

import asyncio

import pytest

from engines.errors import RefactoringAborted, RefactoringRefused
from planner.handover import HandoverPhase
from tests.support.sglang import running
from tests.support.vllm import layout, llama
from tests.vllm.streams import assert_same, move, on_ranks, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop]
LAPS = (on_ranks(6, 2), on_ranks(8, 0), on_ranks(1, 7), on_ranks(4, 4))


async def test_streams_do_not_notice_that_layers_move() -> None:
    async with running(llama(), layout(4), ranks=2) as engine:
        undisturbed = await run_streams(engine)
        streams = asyncio.create_task(run_streams(engine))
        held = []
        for target in LAPS:
            reports = await move(engine, target)
            assert reports[-1].phase is HandoverPhase.DONE
            held.append([stage.weights_bytes for stage in await engine.stages()])
        assert_same(await streams, undisturbed)
        assert engine.epoch == len(LAPS)
        first, last = zip(*held, strict=True)
        assert first[2] < first[0] < first[1]
        assert last[1] < last[0] < last[2]

        await engine.arm_failpoint("core.round", "fail")
        with pytest.raises(RefactoringAborted, match=r"core\.round"):
            await move(engine, LAPS[0])
        assert (engine.pipeline, engine.epoch) == (LAPS[-1], len(LAPS))
        with pytest.raises(RefactoringRefused, match="no rank on cpu:7"):
            await move(engine, layout(4, ranks=(0, 7)))
        await engine.drain()
        counters = await engine.counters()
        assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
