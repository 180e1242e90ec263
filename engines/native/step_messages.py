"""A step in messages: what the stages are told of it, what comes back, and what the daemon is told of that."""

import numpy as np

from engines.native import client_messages as c
from engines.native import messages as m
from engines.native.asks import asks_of
from engines.native.batch import Batch, Output
from engines.native.shared import SharedMemory


def run_step_of(batch: Batch, *, generation: int, shared: SharedMemory) -> m.RunStep:
    """Return what every stage is told of ``batch``; what is large of it is written to shared memory."""
    entries = batch.entries
    sampled = [i for i, entry in enumerate(entries) if entry.samples]
    asks = asks_of(batch, sampled, shared)
    adapters = [e.sequence.adapter for e in entries]
    return m.RunStep(
        step_id=batch.step_id,
        generation=generation,
        rows=_int32([e.sequence.row for e in entries]),
        starts=_int32([e.start for e in entries]),
        counts=_int32([e.count for e in entries]),
        tokens=_int32([t for e in entries for t in e.sequence.tokens[e.start : e.start + e.count]]),
        sampled=_int32(sampled),
        draws=asks.draws,
        logprobs=asks.logprobs,
        shapes=asks.shapes,
        tops=asks.tops,
        scored=asks.scored,
        adapters=_int32(adapters) if any(adapters) else b"",
    )


def sampled_of(done: m.StepDone) -> tuple[list[int], list[float] | None]:
    """Return the tokens that were sampled, and their log-probabilities where asked for."""
    logprobs = np.frombuffer(done.logprobs, dtype=np.float32).tolist() if done.logprobs else None
    return np.frombuffer(done.tokens, dtype=np.int32).tolist(), logprobs


def outputs_of(outputs: list[Output]) -> c.Outputs:
    """Return what the daemon is told of a step's results."""
    return c.Outputs(
        keys=[o.key for o in outputs],
        tokens=[-1 if o.token is None else o.token for o in outputs],
        finishes=["" if o.finish is None else o.finish.value for o in outputs],
        logprobs=[o.logprob for o in outputs],
        details={
            i: c.Details(top=o.top, prompt=o.prompt, cached=o.cached)
            for i, o in enumerate(outputs)
            if o.top or o.prompt or o.cached is not None
        },
    )


def _int32(values: list[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()
