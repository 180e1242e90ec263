"""Tries an engine out before it takes over: what it makes ready at first use must not hold up somebody's stream.

vLLM, for one, has torch compile what counts ranks for log-probabilities when the first request asks for them, in eager
mode too (vLLM 0.32 once, for 10 s on two busy cores); meanwhile no stream gets a token.
"""

import asyncio
from itertools import count
from typing import Final

from engines.errors import EngineError
from engines.protocol import Engine, GenerationRequest, SamplingParams

_PROMPT_TOKENS: Final = 16
_OUTPUT_TOKENS: Final = 4
_GREEDY: Final = SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True)
_SCORED: Final = SamplingParams(max_tokens=_OUTPUT_TOKENS, ignore_eos=True, logprobs=True)
_SAMPLED: Final = SamplingParams(
    max_tokens=_OUTPUT_TOKENS, ignore_eos=True, logprobs=True, temperature=0.8, top_p=0.9, top_k=8, seed=1
)
# Those of a line run together: what is compiled for one request need not do for several.
_ROUNDS: Final = ((_GREEDY,), (_SCORED,), (_SCORED, _SAMPLED, _GREEDY))


async def warm_up(engine: Engine) -> None:
    """Run short requests of each kind to their end, alone and together; none where the model generates nothing.

    Raises:
        EngineError: It does not serve them.
    """
    if not engine.capabilities.generates:
        return
    numbers = count()
    for together in _ROUNDS:
        await asyncio.gather(*(_run(engine, sampling, next(numbers)) for sampling in together))


async def _run(engine: Engine, sampling: SamplingParams, number: int) -> None:
    capabilities = engine.capabilities
    length = max(1, min(_PROMPT_TOKENS, capabilities.max_model_len - _OUTPUT_TOKENS))
    request = GenerationRequest(
        request_id=f"warm-up-{number}",
        prompt_token_ids=tuple((number + place) % capabilities.vocab_size for place in range(length)),
        sampling=sampling,
    )
    got = 0
    async for chunk in engine.generate(request):
        got += len(chunk.token_ids)
    if got == 0:
        raise EngineError("it gave no token when it was tried out")
