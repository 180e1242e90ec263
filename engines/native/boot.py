"""Start of the engine core: read the model's description, build its skeleton, size the KV cache; read no weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from engines.checkpoint import open_checkpoint
from engines.errors import UnsupportedByEngine
from engines.native import attention
from engines.native.compile_family import compile_family
from engines.native.context import WorkerContext
from engines.native.endings import EOS, eos_token_ids
from engines.native.families import build_family
from engines.native.family import Family
from engines.native.inbox import Inbox
from engines.native.kernels.build import KernelBuildFailed, build_kernels, cache_directory
from engines.native.lora import LoraModules
from engines.native.lora_files import files_in, read_adapter
from engines.native.options import NativeOptions
from engines.native.scheduler import SchedulerLimits
from engines.native.shared import SharedMemory, SharedSizes
from engines.native.text_part import text_part
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph

T = TypeVar("T")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Boot:
    """What the core is built from."""

    options: NativeOptions
    pipeline: Pipeline
    epoch: int  # of that pipeline
    context: WorkerContext
    graph: ModelGraph
    limits: SchedulerLimits
    num_blocks: int  # with the one that belongs to nobody: as many as any layout can have
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    attention: str  # "compiled", or "torch" and why where it is the CPU

    @property
    def kv_block_bytes(self) -> int:
        """Of one KV block, over all decoders."""
        return self.graph.kv_bytes_per_token * self.limits.kv_block_tokens

    @property
    def least_kv_blocks(self) -> int:
        """With fewer KV blocks the longest sequence would wait for ever."""
        return -(-self.limits.max_model_len // self.limits.kv_block_tokens)

    def kv_blocks_of(self, *pipelines: Pipeline) -> int:
        """Return how many KV blocks a layout has, or several that exist at once."""
        return min(self.options.kv_size.blocks(self.graph, *pipelines), self.num_blocks - 1)


def boot(options: NativeOptions, pipeline: Pipeline, *, epoch: int) -> Boot:
    """Prepare everything that the workers inherit. Must run before the first fork, on a single thread.

    Raises:
        UnsupportedByEngine: The model, or a feature of it, is not supported; nothing has been read but headers.
    """
    from transformers import AutoConfig

    torch.set_num_threads(1)
    checkpoint = text_part(open_checkpoint(options.model_directory))
    graph = build_model_graph(checkpoint.config, checkpoint.tensors, dtype=options.dtype)
    config = _asked_of_transformers(
        lambda: AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False).get_text_config()
    )
    dtype = _DTYPES[graph.dtype]
    kernels, note = _compiled(options)
    num_blocks = 1 + options.kv_size.most_blocks(graph, len(options.device_ids))
    kv_blocks = min(options.kv_size.blocks(graph, pipeline), num_blocks - 1)
    max_model_len = choose_max_model_len(
        options, graph.max_context_tokens, kv_blocks=kv_blocks, least_blocks=options.kv_size.least_blocks(graph)
    )
    name = attention.register(kernels)
    family = _asked_of_transformers(
        lambda: build_family(config, attention=name, max_model_len=max_model_len, dtype=dtype)
    )
    if kernels is not None and dtype is torch.float32:
        compile_family(family, kernels, kv_block_tokens=options.kv_block_tokens)
    check_pipeline(pipeline, family, options)
    adapters = [read_adapter(files_in(name, directory), family) for name, directory in options.adapters]
    shared = SharedMemory(
        SharedSizes(
            num_workers=len(options.device_ids),
            max_num_seqs=options.max_num_seqs,
            max_blocks_per_seq=-(-max_model_len // options.kv_block_tokens),
            hidden_bytes_per_token=family.hidden_size * dtype.itemsize,
            max_num_batched_tokens=options.max_num_batched_tokens,
            outbox_slots=len(options.device_ids) + 1,
            staging_bytes=max(options.slice_bytes, 2 * family.num_kv_heads * family.head_dim * dtype.itemsize),
            max_model_len=max_model_len,
            vocab_size=int(config.vocab_size),
        )
    )
    shared.kv_end_slot = (1 + kv_blocks) * options.kv_block_tokens  # KV block 0 comes before them
    context = WorkerContext(
        family=family,
        checkpoint=checkpoint,
        shared=shared,
        inboxes=tuple(Inbox() for _ in options.device_ids),
        core_inbox=Inbox(),
        num_slots=num_blocks * options.kv_block_tokens,
        kv_block_tokens=options.kv_block_tokens,
        nice=options.nice,
        visible=options.visible,
        lora=LoraModules(adapters, family.model),
        parameters=options.parameters,
    )
    return Boot(
        options=options,
        pipeline=pipeline,
        epoch=epoch,
        context=context,
        graph=graph,
        limits=SchedulerLimits(
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_block_tokens=options.kv_block_tokens,
        ),
        num_blocks=num_blocks,
        eos_token_ids=eos_token_ids(checkpoint, default=getattr(config, EOS, None), vocab_size=int(config.vocab_size)),
        vocab_size=int(config.vocab_size),
        attention=note,
    )


def _asked_of_transformers(make: Callable[[], T]) -> T:
    """Return what transformers makes of config.json.

    Raises:
        UnsupportedByEngine: It cannot; says why in its words.
    """
    try:
        return make()
    except UnsupportedByEngine:
        raise
    except Exception as error:  # transformers raises what it likes about values that it does not take
        said = " ".join(str(error).split())
        raise UnsupportedByEngine(f"config.json: transformers refuses it: {type(error).__name__}: {said}") from error


def choose_max_model_len(options: NativeOptions, positions: int, *, kv_blocks: int, least_blocks: int) -> int:
    """Return the longest sequence: what the model knows, what is configured and what the KV cache can hold.

    Args:
        kv_blocks: Of the first layout.
        least_blocks: Of every layout there can be: whatever no more is configured, each of them can serve it.

    Raises:
        UnsupportedByEngine: More is configured than the model or the KV cache can hold.
    """
    key, size = ("kv_cache", options.kv_cache_bytes)
    if options.kv_device_bytes:
        key, size = "kv_cache_per_device", options.kv_device_bytes
    capacity = (kv_blocks if options.max_model_len else least_blocks) * options.kv_block_tokens
    if capacity < options.kv_block_tokens:
        raise UnsupportedByEngine(f"{key} of {size} bytes does not hold one KV block")
    if options.max_model_len > positions:
        raise UnsupportedByEngine(
            f"max_model_len {options.max_model_len} is more than the model's {positions} positions"
        )
    if options.max_model_len > capacity:
        raise UnsupportedByEngine(
            f"max_model_len {options.max_model_len} is more than the {capacity} tokens of the KV cache: raise {key}"
        )
    return options.max_model_len or min(positions, capacity)


def check_pipeline(pipeline: Pipeline, family: Family, options: NativeOptions) -> None:
    """Refuse a pipeline that this engine cannot run.

    Raises:
        UnsupportedByEngine: Says which stage and why.
    """
    if pipeline.num_decoders != family.num_decoders:
        raise UnsupportedByEngine(
            f"the layout covers {pipeline.num_decoders} decoders, the model has {family.num_decoders}"
        )
    for index, stage in enumerate(pipeline.stages):
        if len(stage.device_ids) != 1:
            raise UnsupportedByEngine(
                f"stage {index} has {len(stage.device_ids)} devices; the native engine has no tensor parallelism"
            )
        if stage.device_ids[0] not in options.device_ids:
            raise UnsupportedByEngine(f"stage {index} is on {stage.device_ids[0]}, which is not a device here")
        if stage.num_decoders < 1:
            raise UnsupportedByEngine(f"stage {index} has no decoder")


def _compiled(options: NativeOptions) -> tuple[Path | None, str]:
    """Return the library of the kernels (None where they cannot be built), and a word on that."""
    if options.visible:
        return None, "torch"
    try:
        return build_kernels(directory=cache_directory(options.cache_directory)), "compiled"
    except KernelBuildFailed as error:
        return None, f"torch ({error})"
