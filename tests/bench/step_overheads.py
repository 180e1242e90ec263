"""What a step of the native engine takes beside the work of its stages: measured with few streams and nothing else."""

from dataclasses import dataclass
from statistics import fmean, median

from engines.native.adapter import NativeEngine
from tests.bench import direct
from tests.bench.program import prompts

_PROMPT, _TOKENS, _LAST = 64, 64, 48
_ROUNDS = 5
_MANY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """Seconds beside the stages: of every step, and for each sequence in it. ``token_s``: a token of a lone stream."""

    step_s: float
    sequence_s: float
    token_s: float


async def step_overheads(engine: NativeEngine) -> Overheads:
    """Measure what passes between what the stages compute, for one stream and for several.

    Between several stages steps overlap, so that only a lone stream tells: there nothing is said of sequences.
    """
    token_s, alone_s = await _beside_stages(engine, streams=1)
    if engine.pipeline is not None and engine.pipeline.granularity > 1:
        return Overheads(step_s=max(0.0, alone_s), sequence_s=0.0, token_s=token_s)
    _, many_s = await _beside_stages(engine, streams=_MANY)
    sequence_s = max(0.0, (many_s - alone_s) / (_MANY - 1))
    return Overheads(step_s=max(0.0, alone_s - sequence_s), sequence_s=sequence_s, token_s=token_s)


async def _beside_stages(engine: NativeEngine, *, streams: int) -> tuple[float, float]:
    """Return what a token takes, and what of it the stages do not: medians of a few rounds."""
    tokens_s, beside_s = [], []
    for round_number in range(_ROUNDS):
        await engine.stage_steps()  # what was before
        asked = prompts(count=streams, length=_PROMPT, seed=1000 * streams + round_number)
        times_s = (await direct.complete(engine, asked, max_tokens=_TOKENS)).times_s
        steps = await engine.stage_steps()
        computed_s = 0.0
        for tokens, sequences, busy_s in zip(steps.tokens, steps.sequences, steps.busy_s, strict=True):
            full = [s for each, count, s in zip(tokens, sequences, busy_s, strict=True) if each == count == streams]
            computed_s += fmean(full[-_LAST:])
        tokens_s.append(fmean((each[-1] - each[-1 - _LAST]) / _LAST for each in times_s))
        beside_s.append(tokens_s[-1] - computed_s)
    return median(tokens_s), median(beside_s)
