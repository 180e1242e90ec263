"""The native engine with several workers on one GPU, or on the CPU in its place: options, layouts, bytes of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.checkpoint import read_checkpoint
from engines.native.compute import STAND_IN
from engines.native.options import NativeOptions
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph
from tests.bench.program import even
from tests.bench.rigs import longest_output

_WORKERS = tuple(f"worker:{index}" for index in range(4))
_LAPS = (1, 2, 4, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSetup:
    """``visible``: a GPU by UUID, or ``STAND_IN``; ``slice_bytes``: as ``handover.slice_bytes``."""

    visible: str
    model: Path
    graph: ModelGraph
    kv_cache_bytes: int
    max_num_seqs: int
    slice_bytes: int
    threads: int

    @property
    def is_stand_in(self) -> bool:
        return self.visible == STAND_IN

    @property
    def kv_tokens(self) -> int:
        return self.kv_cache_bytes // self.graph.kv_bytes_per_token

    @property
    def laps(self) -> tuple[Pipeline, ...]:
        return tuple(self.even(stages) for stages in _LAPS)

    def even(self, stages: int, *, first_worker: int = 0) -> Pipeline:
        """Return the pipeline of that many stages, with even cuts."""
        return even(stages, devices=_WORKERS[first_worker:], num_decoders=self.graph.num_decoders)

    def longest(self, streams: int, prompt_tokens: int) -> int:
        """Return how many tokens each of the streams may produce."""
        return longest_output(
            streams, prompt_tokens, max_context=self.graph.max_context_tokens, kv_tokens=self.kv_tokens
        )

    def native_options(self) -> NativeOptions:
        """Return the engine's options."""
        return NativeOptions(
            model_directory=str(self.model),
            device_ids=_WORKERS,
            visible=(self.visible,) * len(_WORKERS),
            device_memory_bytes=self.graph.total_weight_bytes + self.kv_cache_bytes + (1 << 30),
            kv_cache_bytes=self.kv_cache_bytes,
            max_num_seqs=self.max_num_seqs,
            slice_bytes=self.slice_bytes,
            threads=self.threads,
            nice=0,
        )

    def step_bytes(self, contexts: Sequence[float]) -> float:
        """Return what a step of one token for each sequence reads: weights but for the embedding, and KV cache."""
        weights = sum(layer.weight_bytes for layer in self.graph.layers[1:])
        return weights + sum(contexts) * self.graph.kv_bytes_per_token


def graph_of(model: Path) -> ModelGraph:
    """Read a model's description."""
    checkpoint = read_checkpoint(model)
    return build_model_graph(checkpoint.config, checkpoint.tensors, dtype="auto")
