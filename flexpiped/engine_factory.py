"""From settings to an engine. The only module of the daemon that knows which engines there are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import assert_never

import msgspec

from engines.checkpoint import Checkpoint, find_model, read_checkpoint
from engines.errors import UnsupportedByEngine
from engines.native import client_messages
from engines.native.adopting import AdoptedCore
from engines.native.options import NativeOptions
from engines.native.text_part import text_part
from engines.outliving import Outliving
from engines.protocol import Engine
from engines.records import Purpose
from engines.sglang import pipelining as sglang_pipelining
from engines.vllm import pipelining as vllm_pipelining
from flexpiped.config_values import Auto
from flexpiped.hardware import host_topology, memory_of_one
from flexpiped.native_interpreter import engine_python
from flexpiped.settings import EngineKind, Settings
from flexpiped.survivors import Survivors, purpose_of, refuse_what_cannot_survive
from planner.errors import UnsupportedModel
from planner.estimated_graph import estimate_model_graph
from planner.layout import Pipeline
from planner.model_graph import LayerKind, ModelGraph, build_model_graph
from topology.device import Device, DeviceKind

# They run code that comes with a model, and models whose layers the planner does not know.
RUN_ALL_FAMILIES = (EngineKind.VLLM, EngineKind.SGLANG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model whose files are here: its description, and the directory of its tokenizer."""

    directory: Path
    tokenizer_directory: Path
    graph: ModelGraph
    generation_config: Mapping[str, object] = field(default_factory=dict)


def find_files(settings: Settings, *, source: str) -> Model:
    """Find the model's files, downloading a hub model that is not here yet, and read their headers. Blocks.

    Raises:
        EngineError: There is no such model, or it is not supported; the message says why.
    """
    if settings.trust_remote_code and settings.engine not in RUN_ALL_FAMILIES:
        raise UnsupportedByEngine(
            f"trust_remote_code: the {settings.engine.value} engine runs no code that comes with a model"
        )
    directory = find_model(source, revision=settings.revision, token_file=settings.hf_token_file)
    checkpoint = read_checkpoint(directory)
    try:
        graph = _graph(settings, checkpoint)
    except UnsupportedModel as error:
        raise UnsupportedByEngine(str(error)) from None
    tokenizer = settings.tokenizer
    return Model(
        directory=directory,
        tokenizer_directory=directory
        if tokenizer is None
        else find_model(tokenizer, token_file=settings.hf_token_file),
        graph=graph,
        generation_config=checkpoint.generation_config,
    )


def _graph(settings: Settings, checkpoint: Checkpoint) -> ModelGraph:
    """Describe the model. Some engines know more families than the planner, and say what they cannot serve."""
    runs_all = settings.engine in RUN_ALL_FAMILIES
    if settings.engine is EngineKind.NATIVE:
        checkpoint = text_part(checkpoint)
    try:
        graph = build_model_graph(checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value)
    except UnsupportedModel:
        if not runs_all:
            raise
        graph = estimate_model_graph(checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value)
    return replace(graph, on_every_stage=_on_every_stage(settings.engine, graph.model_type))


def _on_every_stage(engine: EngineKind, model_type: str) -> frozenset[LayerKind]:
    match engine:
        case EngineKind.VLLM:
            return vllm_pipelining.on_every_rank(model_type)
        case EngineKind.SGLANG:
            return sglang_pipelining.on_every_rank(model_type)
        case EngineKind.NATIVE | EngineKind.FAKE:
            return frozenset()
        case _:
            assert_never(engine)


def devices_of(settings: Settings) -> tuple[Device, ...]:
    """Return the devices that may hold stages, as they are now. Raises ``UnsupportedByEngine``."""
    return host_topology(settings).devices


def ignore_news(_news: str) -> None:
    """Tell nobody."""


def engine_factory(
    settings: Settings,
    model: Model,
    *,
    on_news: Callable[[str], object] = ignore_news,
    survivors: Survivors | None = None,
    parameters: str = "",
) -> Callable[[Pipeline, int], Engine]:
    """Return what makes an engine, not started yet, for the pipeline and epoch to begin with.

    It looks for devices now, which may block, and the engines that it makes later are on those.

    Args:
        on_news: Told what operators should know of an engine that runs, one sentence each.
        survivors: Engines that were there before the daemon, and outlive it; None: there are none.
        parameters: Address of the keeper of parameters; empty: there is none.

    Raises:
        UnsupportedByEngine: It is to outlive the daemon and cannot.
    """
    refuse_what_cannot_survive(settings)
    match settings.engine:
        case EngineKind.NATIVE:
            return _native(settings, model, survivors, parameters)
        case EngineKind.VLLM:
            from flexpiped.served_engines import VllmEngines

            return VllmEngines(settings, model, survivors, on_news, parameters=parameters)
        case EngineKind.SGLANG:
            from flexpiped.served_engines import SglangEngines

            return SglangEngines(settings, model, survivors, parameters=parameters)
        case EngineKind.FAKE:
            return _fake(settings, model)
        case _:
            assert_never(settings.engine)


def _native(
    settings: Settings, model: Model, survivors: Survivors | None, parameters: str
) -> Callable[[Pipeline, int], Engine]:
    from engines.native.adapter import NativeEngine

    options = msgspec.structs.replace(native_options(settings, model), parameters=parameters)
    if survivors is None:
        return lambda pipeline, epoch: NativeEngine(options, pipeline, epoch=epoch)
    purpose = _native_purpose(settings, model)

    def make(pipeline: Pipeline, epoch: int) -> Engine:
        outliving = survivors.outliving_of(purpose, pipeline)
        assert outliving is None or isinstance(outliving, Outliving | AdoptedCore), "what is found is of this kind"
        return NativeEngine(options, pipeline, epoch=epoch, outliving=outliving)

    return make


def engine_purpose(settings: Settings, model: Model) -> Purpose:
    """Return what the configured engine is for, so that only one like it is adopted. Reads files, so it blocks."""
    if settings.engine is EngineKind.NATIVE:
        return _native_purpose(settings, model)
    from flexpiped.served_engines import served_purpose

    return served_purpose(settings, model)


def _native_purpose(settings: Settings, model: Model) -> Purpose:
    return purpose_of(
        settings,
        directory=model.directory,
        options=client_messages.options_digest(native_options(settings, model)),
        protocol=client_messages.protocol_digest(),
    )


def native_options(settings: Settings, model: Model) -> NativeOptions:
    """Return what the native engine is told."""
    native, handover = settings.engines.native, settings.handover
    devices = devices_of(settings)
    on_gpus = devices[0].kind is DeviceKind.CUDA  # then all are
    return NativeOptions(
        model_directory=str(model.directory),
        device_ids=tuple(device.id for device in devices),
        device_memory_bytes=memory_of_one(devices),
        visible=tuple(device.id for device in devices) if on_gpus else (),
        python=engine_python(settings),
        dtype=settings.dtype.value,
        max_model_len=auto_as_zero(settings.max_model_len),
        kv_cache_bytes=native.kv_cache_bytes,
        kv_device_bytes=auto_as_zero(native.kv_cache_per_device_bytes),
        kv_block_tokens=native.kv_block_tokens,
        prefix_caching=native.prefix_caching,
        max_num_seqs=native.max_num_seqs,
        max_num_batched_tokens=native.max_num_batched_tokens,
        max_micro_batches=auto_as_zero(native.max_micro_batches),
        threads=auto_as_zero(native.threads),
        threads_per_device=auto_as_zero(native.threads_per_device),
        nice=native.nice,
        hang_deadline_s=native.hang_deadline_s,
        prepare_deadline_s=handover.prepare_deadline_s,
        sync_deadline_s=handover.sync_deadline_s,
        commit_deadline_s=handover.commit_deadline_s,
        max_rounds=handover.max_rounds,
        remainder_slots=handover.remainder_slots,
        slice_bytes=handover.slice_bytes,
        copy_bytes_per_s=auto_as_zero(handover.copy_bytes_per_s),
        adapters=tuple(native.adapters.items()),
        cache_directory="" if native.cache_dir is None else str(native.cache_dir),
    )


def _fake(settings: Settings, model: Model) -> Callable[[Pipeline, int], Engine]:
    from engines.fake import FAKE_CAPABILITIES, FakeEngine

    length = settings.max_model_len
    max_model_len = model.graph.max_context_tokens if length is Auto.AUTO else length
    capabilities = replace(
        FAKE_CAPABILITIES,
        max_model_len=max_model_len,
        vocab_size=model.graph.vocab_size,
        max_stages=settings.devices.cpu_count,
    )
    block_tokens = settings.engines.native.kv_block_tokens
    return lambda pipeline, epoch: FakeEngine(
        pipeline=pipeline,
        epoch=epoch,
        capabilities=capabilities,
        step_s=0.01,
        refactor_phase_s=0.05,
        kv_block_tokens=block_tokens,
        kv_blocks_capacity=4 * -(-max_model_len // block_tokens),
    )


def auto_as_zero(value: int | Auto) -> int:
    """Return a number as the engine's options have it: 0 for auto."""
    return 0 if value is Auto.AUTO else value
