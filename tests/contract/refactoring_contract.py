"""The contract of changes while requests run: another layout, another number of KV blocks."""

import asyncio
import itertools
from dataclasses import replace

import pytest

from engines.closing import closing
from engines.errors import RefactoringBusy, RefactoringRefused
from engines.offers import KvResizing
from engines.protocol import Engine, RefactorProgress
from planner.handover import HandoverPhase
from planner.layout import Pipeline, Stage
from tests.contract.contract_requests import PROMPT, assert_idle, in_flight, request_of, tokens_of
from tests.support.until import until

FORWARD = [
    HandoverPhase.PREPARING,
    HandoverPhase.SYNCING,
    HandoverPhase.COMMITTING,
    HandoverPhase.RETIRING,
    HandoverPhase.DONE,
]


async def ended(engine: Engine, refactorings_total: int) -> bool:
    return (await engine.counters()).refactorings_total == refactorings_total


def refactoring_of(engine: Engine, targets: tuple[Pipeline, ...]) -> Pipeline:
    """Return a target that is not in force, or skip."""
    if not engine.capabilities.refactors_in_place:
        pytest.skip(f"{engine.capabilities.name} does not refactor in place")
    return next(target for target in targets if target != engine.pipeline)


async def assert_stages_are_of_the_layout(engine: Engine) -> None:
    """What the stages say they are is the layout in force."""
    stages = await engine.stages()
    described = Pipeline(
        stages=tuple(
            Stage(device_ids=s.device_ids, first_decoder=s.first_decoder, end_decoder=s.end_decoder) for s in stages
        )
    )
    assert described == engine.pipeline
    assert [stage.index for stage in stages] == list(range(len(stages)))


class RefactoringContract:
    """With the fixtures ``engine`` and ``targets`` (``engine_contract``)."""

    # Refactoring.

    async def test_a_refactoring_reports_its_phases_in_order(
        self, engine: Engine, targets: tuple[Pipeline, ...]
    ) -> None:
        target = refactoring_of(engine, targets)
        epoch, total = engine.epoch, (await engine.counters()).refactorings_total
        assert (await engine.check_refactor(target)).feasible
        reports: list[RefactorProgress] = [report async for report in engine.refactor(target)]
        assert [phase for phase, _same in itertools.groupby(reports, key=lambda r: r.phase)] == FORWARD
        assert all(a.elapsed_s <= b.elapsed_s for a, b in itertools.pairwise(reports))
        assert engine.pipeline == target
        assert engine.epoch == epoch + 1 == reports[-1].epoch
        assert (await engine.counters()).refactorings_total == total + 1
        await assert_stages_are_of_the_layout(engine)

    async def test_streams_across_refactorings_are_as_undisturbed(
        self, engine: Engine, targets: tuple[Pipeline, ...]
    ) -> None:
        refactoring_of(engine, targets)
        requests = [request_of((*PROMPT, 3 + i), temperature=float(i % 2), seed=i, max_tokens=60) for i in range(8)]
        undisturbed = [await tokens_of(engine, request) for request in requests]
        again = [replace(request, request_id=f"{request.request_id}-moved") for request in requests]
        streams = [asyncio.create_task(tokens_of(engine, request)) for request in again]
        for target in (targets[0], targets[1], targets[0]):
            if target != engine.pipeline:
                reports = [report async for report in engine.refactor(target)]
                assert reports[-1].phase is HandoverPhase.DONE
        assert await asyncio.gather(*streams) == undisturbed
        await assert_idle(engine)

    async def test_a_second_refactoring_is_busy(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        target = refactoring_of(engine, targets)
        async with closing(engine.refactor(target)) as reports:
            await anext(reports)
            with pytest.raises(RefactoringBusy):
                await anext(aiter(engine.refactor(target)))
            async for report in reports:
                last = report
        assert last.phase is HandoverPhase.DONE

    async def test_closing_the_reports_does_not_cancel(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        target = refactoring_of(engine, targets)
        epoch, total = engine.epoch, (await engine.counters()).refactorings_total
        async with closing(engine.refactor(target)) as reports:
            await anext(reports)
        assert await tokens_of(engine, request_of(max_tokens=2))
        await until(lambda: ended(engine, total + 1), timeout_s=60.0)
        assert (engine.pipeline, engine.epoch) == (target, epoch + 1)

    async def test_a_meaningless_layout_is_refused(self, engine: Engine, targets: tuple[Pipeline, ...]) -> None:
        refactoring_of(engine, targets)
        device = engine.pipeline.device_ids[0]
        short = engine.pipeline.num_decoders - 1
        wrong = Pipeline(stages=(Stage(device_ids=(device,), first_decoder=0, end_decoder=short),))
        epoch, pipeline = engine.epoch, engine.pipeline
        check = await engine.check_refactor(wrong)
        assert not check.feasible
        assert check.sentences
        with pytest.raises(RefactoringRefused):
            await anext(aiter(engine.refactor(wrong)))
        assert (engine.epoch, engine.pipeline) == (epoch, pipeline)

    async def test_there_is_nothing_to_cancel_when_idle(self, engine: Engine) -> None:
        assert await engine.cancel_refactor() is False

    # Another number of KV blocks.

    async def test_streams_go_on_as_undisturbed_while_the_kv_cache_shrinks_and_grows(self, engine: Engine) -> None:
        bounds = engine.capabilities.kv_range
        if bounds is None:
            pytest.skip(f"{engine.capabilities.name} does not change its KV cache")
        assert isinstance(engine, KvResizing)
        requests = [request_of((*PROMPT, 40 + index), max_tokens=60) for index in range(8)]
        expected = [await tokens_of(engine, each) for each in requests]
        streams = [asyncio.create_task(tokens_of(engine, each)) for each in requests]
        await until(lambda: in_flight(engine), timeout_s=60.0)
        for blocks in (bounds.least_blocks, bounds.most_blocks, bounds.least_blocks, bounds.most_blocks):
            await engine.resize_kv(blocks)
            assert (await engine.counters()).kv_blocks_capacity == blocks
        assert [await each for each in streams] == expected
        await assert_idle(engine)

    async def test_a_number_of_kv_blocks_out_of_range_is_refused(self, engine: Engine) -> None:
        bounds = engine.capabilities.kv_range
        if bounds is None:
            pytest.skip(f"{engine.capabilities.name} does not change its KV cache")
        assert isinstance(engine, KvResizing)
        for blocks in (bounds.least_blocks - 1, bounds.most_blocks + 1):
            with pytest.raises(RefactoringRefused):
                await engine.resize_kv(blocks)
