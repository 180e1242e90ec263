"""Starting real vLLM for tests: where its interpreter is, and a checkpoint that its CPU kernels take."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from engines.checkpoint import read_checkpoint
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from engines.vllm.recompile import Recompilation
from planner.layout import Pipeline, pipeline_of
from planner.model_graph import ModelGraph, build_model_graph
from tests.engines.install_vllm import VLLM
from tests.engines.interpreter import ensure_there
from tests.support import checkpoints
from tests.support.native import CACHE

DECODERS = 8


def interpreter() -> str:
    """Return the interpreter that has vLLM, or skip."""
    return ensure_there(VLLM)


def llama() -> Path:
    """Return a Llama of 8 decoders whose heads are wide enough for vLLM's CPU attention (32)."""
    return checkpoints.make_llama(CACHE / "llama-heads-of-32", hidden_size=128, intermediate_size=352)


def roomy_llama() -> Path:
    """Return the same with a context that no stream fills while it is handed over, however slow the machine is."""
    return checkpoints.make_llama(
        CACHE / "llama-heads-of-32-roomy", hidden_size=128, intermediate_size=352, max_position_embeddings=16384
    )


def graph_of(directory: Path, *, dtype: str = "float32") -> ModelGraph:
    checkpoint = read_checkpoint(directory)
    return build_model_graph(checkpoint.config, checkpoint.tensors, dtype=dtype)


def devices(ranks: int, *, tensor_parallel: int = 1) -> tuple[str, ...]:
    return tuple(f"cpu:{index}" for index in range(ranks * tensor_parallel))


def options_for(directory: Path, *, ranks: int, **overrides: object) -> VllmOptions:
    """Return options that suit a small checkpoint: fp32, so that output is exact, and KV blocks compared at commit."""
    graph = graph_of(directory)
    values: dict[str, object] = {
        "python": interpreter(),
        "model_directory": str(directory),
        "served_model_name": directory.name,
        "device_ids": devices(ranks),
        "device_memory_bytes": 1 << 30,
        "num_decoders": graph.num_decoders,
        "kv_bytes_per_token": graph.decoders[0].kv_bytes_per_token,
        "dtype": "float32",
        "kv_cache_bytes": 32 << 20,
        "verify_checksums": True,
    }
    return VllmOptions(**(values | overrides))  # type: ignore[arg-type]


def layout(*cuts: int, ranks: tuple[int, ...] = (), num_decoders: int = DECODERS) -> Pipeline:
    """Return a pipeline with these cuts on these ranks (by default the first ones)."""
    places = ranks or tuple(range(len(cuts) + 1))
    return pipeline_of(device_ids=[f"cpu:{rank}" for rank in places], cuts=cuts, num_decoders=num_decoders)


def _ignore(_news: object) -> None:
    pass


@asynccontextmanager
async def running(
    directory: Path,
    pipeline: Pipeline,
    *,
    ranks: int,
    on_recompiled: Callable[[Recompilation], None] = _ignore,
    **overrides: object,
) -> AsyncIterator[VllmEngine]:
    """Start an engine and close it on the way out."""
    options = options_for(directory, ranks=ranks, **overrides)
    engine = VllmEngine(options, pipeline, graph=graph_of(directory), on_recompiled=on_recompiled)
    await engine.start(on_progress=lambda _message: None)
    try:
        yield engine
    finally:
        await engine.close()
