"""An engine is tried out before it serves where that may hold up a stream, and one that fails does not serve."""

from dataclasses import replace

import pytest

from engines.errors import EngineError, InvalidRequest
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from flexpiped.supervisor import Supervisor
from flexpiped.warming import warm_up
from tests.contract.engine_contract import request_of
from tests.support.layouts import even_pipeline


async def started(**options: object) -> FakeEngine:
    engine = FakeEngine(pipeline=even_pipeline(2), **options)  # type: ignore[arg-type]
    await engine.start(on_progress=lambda _message: None)
    return engine


async def test_it_is_idle_again_afterwards() -> None:
    engine = await started()
    await warm_up(engine)
    counters = await engine.counters()
    assert counters.generated_tokens_total > 0
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
    await engine.close()


async def test_a_short_context_is_enough() -> None:
    engine = await started(capabilities=replace(FAKE_CAPABILITIES, max_model_len=8))
    await warm_up(engine)
    await engine.close()


async def test_an_engine_that_dies_of_it_does_not_pass() -> None:
    engine = await started()
    engine.hold()
    engine.kill("it dies of the first request")
    with pytest.raises(EngineError, match="of the first request"):
        await warm_up(engine)
    await engine.close()


async def test_a_model_that_generates_nothing_is_not_tried_out() -> None:
    engine = await started(capabilities=replace(FAKE_CAPABILITIES, generates=False))
    await warm_up(engine)
    assert (await engine.counters()).steps_total == 0
    with pytest.raises(InvalidRequest, match="the fake engine generates nothing with this model"):
        await anext(engine.generate(request_of((5,), max_tokens=1)))
    await engine.close()


@pytest.mark.parametrize("compiles", [True, False])
async def test_a_first_start_tries_out_what_compiles_at_first_use(compiles: bool) -> None:
    capabilities = replace(FAKE_CAPABILITIES, compiles_at_first_use=compiles)
    told: list[str] = []
    supervisor = Supervisor(
        factory=lambda pipeline, epoch: FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=capabilities),
        pipeline=even_pipeline(2),
        on_progress=told.append,
    )
    await supervisor.start()
    assert supervisor.engine is not None
    assert ((await supervisor.engine.counters()).generated_tokens_total > 0) is compiles
    assert any("trying the engine out" in message for message in told) is compiles
    await supervisor.close()


async def test_a_first_start_whose_engine_serves_nothing_fails_and_closes_it() -> None:
    engine = FakeEngine(pipeline=even_pipeline(2), capabilities=replace(FAKE_CAPABILITIES, compiles_at_first_use=True))
    supervisor = Supervisor(
        factory=lambda _pipeline, _epoch: engine,
        pipeline=even_pipeline(2),
        on_progress=lambda message: engine.kill("it dies of it") if "trying" in message else None,
    )
    with pytest.raises(EngineError, match="it dies of it"):
        await supervisor.start()
    assert supervisor.engine is None
    await supervisor.close()
