"""Log-probabilities are the model's own: what another implementation of it says, in float32."""

import pytest

from engines.sglang.adapter import SglangEngine
from tests.support.adapters import logprobs_of, merged
from tests.support.vllm import llama
from tests.vllm.streams import assert_same, run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]
STREAMS = 3


async def test_they_are_those_of_transformers(engine: SglangEngine) -> None:
    found = await run_streams(engine, count=STREAMS, max_tokens=40)
    model = merged(llama(), None)
    prompts = [stream(index).prompt_token_ids for index in range(STREAMS)]
    reference = [
        (tokens, logprobs_of(model, prompt, tokens)) for prompt, (tokens, _) in zip(prompts, found, strict=True)
    ]
    assert_same(found, reference)
