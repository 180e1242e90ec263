"""What one step of a replica takes, from the same ``PipelineTimes`` as a prediction, remembered by its size."""

from math import ceil
from typing import NamedTuple

from planner.layer_costs import Batch, decode_batch
from planner.prediction import PipelineTimes

_EXACT = 32  # numbers up to here are priced as they are, larger ones to a 32nd of themselves


class StepTime(NamedTuple):
    """``slowest_s``: of the slowest stage, so until the next micro-batch can follow; ``passing_s``: through all stages.

    ``busy_s``: what the stages compute, all together.
    """

    slowest_s: float
    passing_s: float
    busy_s: float


NOTHING = StepTime(0.0, 0.0, 0.0)


class StepTimes:
    """Times of decoding steps, and of what a chunk of prompts adds to one.

    Both are linear in what they compute, nearly, so a mixed step is priced as the decoding with what the chunk adds:
    its time less that of one token, which the decoding has paid already (``planner.prediction`` does the same).
    """

    def __init__(self, times: PipelineTimes) -> None:
        self.times = times
        self.num_stages = len(times.stages)
        self.micro_batches = times.micro_batches or self.num_stages
        self._decodes: dict[tuple[int, int, bool], StepTime] = {}
        self._chunks: dict[tuple[int, int, int, bool], StepTime] = {}

    def decode(self, sequences: int, context_tokens: float, *, beside: bool) -> StepTime:
        """Return a step of ``sequences`` with ``context_tokens`` each; ``beside``: while other micro-batches run."""
        key = (_rounded(sequences), _rounded(int(context_tokens)), beside)
        found = self._decodes.get(key)
        if found is None:
            batch = decode_batch(sequences=key[0], context_tokens=max(1, key[1]))
            found = self._decodes[key] = self._price(batch, beside=beside)
        return found

    def chunk(self, tokens: int, sequences: int, context_tokens: int, *, beside: bool) -> StepTime:
        """Return what ``tokens`` of ``sequences`` prompts, with so much context in all, add to a decoding step."""
        key = (_rounded(tokens), min(sequences, tokens), _rounded(context_tokens), beside)
        found = self._chunks.get(key)
        if found is None:
            tokens, sequences = key[0], min(key[1], key[0])
            whole = self._price(
                Batch(tokens=tokens, sequences=sequences, context_tokens=max(tokens, key[2])), beside=beside
            )
            token = self._price(decode_batch(sequences=1, context_tokens=1), beside=beside)
            found = StepTime(*(max(0.0, a - b) for a, b in zip(whole, token, strict=True)))
            self._chunks[key] = found
        return found

    def token(self, *, beside: bool) -> StepTime:
        """Return a step of one token: what a chunk costs where nothing decodes beside it, beyond what it adds."""
        return self.decode(1, 1, beside=beside)

    def _price(self, batch: Batch, *, beside: bool) -> StepTime:
        times = self.times
        stages = [stage(batch) for stage in (times.stages_beside if beside else ()) or times.stages]
        at_once = times.stages_at_once if beside else None
        slowest = max(max(stages), sum(stages) / at_once if at_once else 0.0)
        passing = times.passing_s(stages, tokens=batch.tokens, sequences=batch.sequences)
        return StepTime(slowest, passing, sum(stages))


def _rounded(number: int) -> int:
    """Return a number near it, of few."""
    if number <= _EXACT:
        return number
    step = 1 << (number.bit_length() - _EXACT.bit_length())
    return ceil(number / step) * step if step > 1 else number
