"""What a profile measures: which layouts, and which batches on each. Pure, and free of torch."""

from dataclasses import dataclass

from engines.native.options import threads_per_stage
from planner.layer_costs import Batch, decode_batch, prefill_batch
from planner.layout import Pipeline, pipeline_of

_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
_PROMPTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SHORT_CONTEXT = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine takes at once."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_blocks: int  # that sequences may have
    kv_block_tokens: int

    def deepest(self, lanes: int) -> int:
        """Return how many tokens each of ``lanes`` sequences may have in KV blocks of its own."""
        return min(self.max_model_len, self.kv_blocks // lanes * self.kv_block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayout:
    """A pipeline to measure, the threads of each stage, and the micro-batches kept in flight."""

    pipeline: Pipeline
    threads: int
    in_flight: int


def timed_layouts(
    *, device_ids: tuple[str, ...], num_decoders: int, cores: int, threads_per_device: int = 0
) -> tuple[TimedLayout, ...]:
    """Return for each number of threads that a stage may have the layout with fewest stages, and one of many stages.

    With several stages, once one after the other and once as many at a time as there are cores: side by side they are
    slower, because they share memory bandwidth, caches and execution units.
    """

    def threads_of(stages: int) -> int:
        return threads_per_stage(num_stages=stages, threads=cores, per_device=threads_per_device)

    most = min(len(device_ids), num_decoders)
    fewest: dict[int, int] = {}
    for stages in range(1, most + 1):
        fewest.setdefault(threads_of(stages), stages)
    found: list[TimedLayout] = []
    for stages in sorted({*fewest.values(), min(most, 4 * cores)}):
        cuts = [num_decoders * index // stages for index in range(1, stages)]
        pipeline = pipeline_of(device_ids=device_ids[:stages], cuts=cuts, num_decoders=num_decoders)
        threads = threads_of(stages)
        beside = min(stages, cores)
        found += [
            TimedLayout(pipeline=pipeline, threads=threads, in_flight=in_flight) for in_flight in sorted({1, beside})
        ]
    return tuple(found)


def timed_batches(limits: Limits, *, in_flight: int) -> tuple[Batch, ...]:
    """Return decoding steps over sequences and contexts, and steps over prompts and later pieces of prompts."""
    longest = limits.deepest(in_flight)
    found: list[Batch] = []
    for sequences in _SEQUENCES:
        if sequences * in_flight > limits.max_num_seqs or sequences > limits.max_num_batched_tokens:
            break
        deepest = limits.deepest(sequences * in_flight)
        contexts = {min(_SHORT_CONTEXT, deepest), max(1, deepest // 4), deepest} if deepest else set()
        found += [decode_batch(sequences=sequences, context_tokens=context) for context in sorted(contexts)]
    pieces = [tokens for tokens in _PROMPTS if tokens <= min(longest, limits.max_num_batched_tokens)]
    found += [prefill_batch(tokens=tokens) for tokens in pieces]
    found += [
        prefill_batch(tokens=tokens, context_tokens=4 * tokens) for tokens in pieces[-3:] if 4 * tokens <= longest
    ]
    return tuple(found)
