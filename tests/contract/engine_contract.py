"""The contract of ``engines.protocol.Engine``, as tests that every engine passes.

A test file subclasses ``EngineContract`` with these fixtures:

- ``engine``: a started engine. It may be shared by the tests of the class: each leaves it idle.
- ``disposable_engine``: a started engine that the test closes.
- ``targets``: at least two pipelines that differ from each other, none of them in force at first, all accepted.

What an engine cannot do by its ``capabilities`` is skipped.
"""

import asyncio

import pytest

from engines.closing import closing
from engines.errors import EngineClosed
from engines.protocol import Engine
from tests.contract.contract_requests import PROMPT, assert_idle, chunks_of, in_flight, request_of, tokens_of
from tests.contract.generation_contract import GenerationContract
from tests.contract.refactoring_contract import RefactoringContract, assert_stages_are_of_the_layout
from tests.support.until import until


class EngineContract(GenerationContract, RefactoringContract):
    """Subclassed once per engine."""

    # What it says of itself.

    async def test_counters_move(self, engine: Engine) -> None:
        before = await engine.counters()
        await tokens_of(engine, request_of(max_tokens=10))
        after = await engine.counters()
        assert after.prompt_tokens_total - before.prompt_tokens_total == len(PROMPT)
        assert after.generated_tokens_total - before.generated_tokens_total == 10
        assert after.steps_total > before.steps_total
        assert after.kv_block_tokens > 0
        assert after.kv_blocks_capacity * after.kv_block_tokens >= engine.capabilities.max_model_len

    async def test_counters_show_a_request_in_flight(self, engine: Engine) -> None:
        async with closing(engine.generate(request_of(max_tokens=400))) as chunks:
            await anext(chunks)
            counters = await engine.counters()
            assert counters.running + counters.waiting == 1
            assert counters.kv_blocks_used >= 1
        await assert_idle(engine)

    async def test_stages_cover_all_decoders(self, engine: Engine) -> None:
        await assert_stages_are_of_the_layout(engine)

    # The end.

    async def test_drain_waits_for_the_last_request(self, engine: Engine) -> None:
        stream = asyncio.create_task(tokens_of(engine, request_of(max_tokens=30)))
        await until(lambda: in_flight(engine), timeout_s=60.0)
        await engine.drain()
        counters = await engine.counters()
        assert counters.running + counters.waiting == 0
        assert len(await stream) == 30

    async def test_close_is_idempotent_and_final(self, disposable_engine: Engine) -> None:
        engine = disposable_engine
        stream = aiter(engine.generate(request_of(max_tokens=400)))
        await anext(stream)
        await engine.close()
        await engine.close()
        with pytest.raises(EngineClosed):
            [chunk async for chunk in stream]
        with pytest.raises(EngineClosed):
            await chunks_of(engine, request_of())
        with pytest.raises(EngineClosed):
            await engine.counters()
