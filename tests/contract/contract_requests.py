"""What the parts of the contract ask of an engine, and how they see that nothing is left of it."""

import itertools

from engines.protocol import Engine, GenerationRequest, SamplingParams, TokenChunk

PROMPT = (5, 9, 17, 33)
_ids = itertools.count()


def request_of(
    prompt: tuple[int, ...] = PROMPT,
    *,
    max_tokens: int = 24,
    temperature: float = 0.0,
    seed: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    generated: tuple[int, ...] = (),
    ignore_eos: bool = True,
    logprobs: bool = False,
) -> GenerationRequest:
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
    )
    return GenerationRequest(
        request_id=f"contract-{next(_ids)}", prompt_token_ids=prompt, sampling=sampling, generated_token_ids=generated
    )


async def chunks_of(engine: Engine, request: GenerationRequest) -> list[TokenChunk]:
    return [chunk async for chunk in engine.generate(request)]


async def tokens_of(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    return tuple(token for chunk in await chunks_of(engine, request) for token in chunk.token_ids)


async def assert_idle(engine: Engine) -> None:
    """Nothing is left of any request: the leak check of every test that ends one early."""
    await engine.drain()
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)


async def in_flight(engine: Engine) -> bool:
    counters = await engine.counters()
    return counters.running + counters.waiting > 0
