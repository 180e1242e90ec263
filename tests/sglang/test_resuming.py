"""What goes on after a replay as it would have: output under penalties, which count what came before."""

from dataclasses import replace

import pytest

from engines.sglang.adapter import SglangEngine
from tests.contract.contract_requests import request_of, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]
PENALTIES = ({"frequency_penalty": 1.5}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.8})


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: next(iter(penalty)))
@pytest.mark.parametrize("already", [1, 9, 30])
async def test_penalties_count_what_was_replayed(engine: SglangEngine, penalty: dict[str, float], already: int) -> None:
    free = request_of(max_tokens=40)
    held = replace(free, sampling=replace(free.sampling, engine_params=penalty))
    whole = await tokens_of(engine, held)
    assert whole != await tokens_of(engine, free)  # else this would show nothing
    assert await tokens_of(engine, replace(held, generated_token_ids=whole[:already])) == whole[already:]
