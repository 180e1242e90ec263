"""A second instance is tried out before it takes over, and one that does not serve does not."""

from dataclasses import replace

import pytest

from engines.errors import EngineError
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from flexpiped.warming import warm_up
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
