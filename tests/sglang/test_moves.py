"""Layers move in SGLang as the daemon has it: adapter, handovers and plugin together. See ``test_plugin_moves.py``."""

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from engines.errors import RefactoringAborted, RefactoringRefused
from engines.parameters.keeper import ParameterKeeper
from engines.served.logs import LogLine
from engines.sglang.adapter import SglangEngine
from engines.sglang.pipelining import on_every_rank
from planner.handover import HandoverPhase
from planner.holdings import holdings, weight_bytes
from planner.layout import Pipeline
from tests.contract.contract_requests import assert_idle
from tests.sglang.conftest import Shared
from tests.support.until import until
from tests.support.vllm import graph_of, layout, llama
from tests.vllm.streams import (
    assert_same,
    check_found_again,
    check_killed_helper_is_replaced,
    move,
    on_ranks,
    run_streams,
)

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]
EVEN = on_ranks(4, 4)
LAPS = (on_ranks(6, 2), on_ranks(8, 0), on_ranks(1, 7), EVEN)
STEPS = 20
LONGEST_SLICE_S = 0.005


async def test_streams_do_not_notice_that_layers_move(engine: SglangEngine) -> None:
    await move(engine, EVEN)
    epoch = engine.epoch
    undisturbed = await run_streams(engine)
    streams = asyncio.create_task(run_streams(engine))
    held = []
    for target in LAPS:
        reports = await move(engine, target)
        assert reports[-1].phase is HandoverPhase.DONE
        held.append([stage.weights_bytes for stage in await engine.stages()])
    assert_same(await streams, undisturbed)
    assert engine.epoch == epoch + len(LAPS)
    first, last = zip(*held, strict=True)
    assert first[2] < first[0] < first[1]
    assert last[1] < last[0] < last[2]

    await engine.arm_failpoint("core.round", "fail")
    with pytest.raises(RefactoringAborted, match=r"core\.round"):
        await move(engine, LAPS[0])
    assert (engine.pipeline, engine.epoch) == (EVEN, epoch + len(LAPS))
    await assert_idle(engine)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (layout(), "the head stays on rank 1"),
        (layout(ranks=(1,)), "the embedding stays on rank 0"),
        (layout(4, num_decoders=9), "9"),
        (layout(0), "rank 0 must hold at least one decoder"),
        (layout(4, ranks=(1, 0)), "order"),
        (layout(4, ranks=(0, 7)), "no rank on cpu:7"),
    ],
)
async def test_what_cannot_be_is_refused_before_anything_moves(
    engine: SglangEngine, target: Pipeline, reason: str
) -> None:
    before = engine.pipeline, engine.epoch
    with pytest.raises(RefactoringRefused, match=reason):
        await move(engine, target)
    assert (engine.pipeline, engine.epoch) == before


async def test_a_rank_holds_what_plans_and_checks_count(engine: SglangEngine) -> None:
    await move(engine, EVEN)
    graph = replace(graph_of(llama()), on_every_stage=on_every_rank("llama"))
    counted = [weight_bytes(held, graph) for held in holdings(EVEN, graph).values()]
    held = [stage.weights_bytes for stage in await engine.stages()]
    assert held == pytest.approx(
        counted, abs=4 * graph.hidden_size
    )  # the norm before the head, which the last rank has


async def test_a_cancelled_move_is_as_if_it_had_not_been(engine: SglangEngine) -> None:
    await move(engine, EVEN)
    undisturbed = await run_streams(engine, count=2, max_tokens=20)
    moving = engine.refactor(on_ranks(6, 2))
    await anext(moving)
    assert await engine.cancel_refactor()
    with pytest.raises(RefactoringAborted, match="cancelled"):
        async for _ in moving:
            pass
    assert engine.pipeline == EVEN
    assert not await engine.cancel_refactor()
    assert_same(await run_streams(engine, count=2, max_tokens=20), undisturbed)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process do nothing while the scope lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_another_process_loads_layers_beside_the_steps(engine: SglangEngine) -> None:
    """While it is stopped the steps go on, and the layer comes when it goes on, too: no step waits for a load."""
    await move(engine, EVEN)
    helper = engine.pids["helpers"][1]
    assert helper not in engine.pids["workers"]
    undisturbed = await run_streams(engine, count=4)
    streams = asyncio.create_task(run_streams(engine, count=4))
    with stopped(helper):
        moving = asyncio.create_task(move(engine, on_ranks(3, 5)))
        before = (await engine.counters()).steps_total

        async def stepped() -> bool:
            return (await engine.counters()).steps_total >= before + STEPS

        await until(stepped, timeout_s=60.0)
        assert not moving.done()
        assert engine.pipeline == EVEN
    assert (await moving)[-1].phase is HandoverPhase.DONE
    assert_same(await streams, undisturbed)


async def test_streams_and_moves_survive_the_death_of_the_process_that_loads_layers(engine: SglangEngine) -> None:
    await move(engine, EVEN)
    await check_killed_helper_is_replaced(engine, 0, on_ranks(6, 2))


async def test_layers_that_were_loaded_before_come_from_the_memory_of_the_host(
    engine: SglangEngine, keeper: ParameterKeeper
) -> None:
    await check_found_again(engine, keeper, on_ranks(2, 6), EVEN, gained=2)


@pytest.mark.long  # a figure of time: what other tenants of a machine take of its cores counts in it
async def test_layers_are_adopted_in_short_slices(engine: SglangEngine) -> None:
    """What is left to do in the process of the steps, by CPU time."""
    await move(engine, on_ranks(1, 7))
    await move(engine, on_ranks(7, 1))
    longest = [(await engine.rank_status(rank))["longest_slice_s"] for rank in range(2)]
    assert all(0 < slice_s < LONGEST_SLICE_S for slice_s in longest), longest


async def test_nobody_has_ever_asked_it_whether_it_is_healthy(shared: Shared) -> None:
    """Not at the start, in a move, nor between: ``/health`` generates, and says that it is well in a pause."""
    streams = asyncio.create_task(run_streams(shared.engine, count=1, max_tokens=40))
    for target in (on_ranks(5, 3), EVEN):
        await move(shared.engine, target)
    await streams
    await until(lambda: {"/model_info", "/generate"} <= asked_of(shared.log))
    assert [path for path in asked_of(shared.log) if path.startswith(("/health", "/ready"))] == []


def asked_of(log: list[LogLine]) -> set[str]:
    """Return the routes that the API server has noted."""
    return {found[1] for line in log if (found := re.search(r'"[A-Z]+ (/\S*) HTTP', line.message))}
