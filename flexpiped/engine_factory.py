"""From settings to an engine. The only module of the daemon that knows which engines there are."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

from engines.checkpoint import Checkpoint, find_model, read_checkpoint
from engines.errors import UnsupportedByEngine
from engines.native.options import NativeOptions
from engines.protocol import Engine
from engines.served.ranks import Ranks, rank_devices, widened
from engines.vllm.options import VllmOptions
from engines.vllm.recompile import Recompilation
from flexpiped import log_events
from flexpiped.config_values import Auto
from flexpiped.hardware import host_topology, memory_of_one
from flexpiped.models import model_source, served_name
from flexpiped.settings import EngineKind, Settings
from planner.errors import UnsupportedModel
from planner.estimated_graph import estimate_model_graph
from planner.layout import Pipeline
from planner.model_families import NATIVE
from planner.model_graph import ModelGraph, build_model_graph
from topology.device import Device, DeviceKind
from topology.units import format_bytes_apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model whose files are here: its description, and the directory of its tokenizer."""

    directory: Path
    tokenizer_directory: Path
    graph: ModelGraph


def find_files(settings: Settings, *, source: str) -> Model:
    """Find the model's files, downloading a hub model that is not here yet, and read their headers. Blocks.

    Raises:
        EngineError: There is no such model, or it is not supported; the message says why.
    """
    if settings.trust_remote_code and settings.engine is not EngineKind.VLLM:
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
    )


def _graph(settings: Settings, checkpoint: Checkpoint) -> ModelGraph:
    """Describe the model. vLLM knows more families than the planner, and says itself what it cannot serve."""
    runs_all = settings.engine is EngineKind.VLLM
    try:
        return build_model_graph(
            checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value, engine=None if runs_all else NATIVE
        )
    except UnsupportedModel:
        if not runs_all:
            raise
        return estimate_model_graph(checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value)


def devices_of(settings: Settings) -> tuple[Device, ...]:
    """Return the devices that may hold stages, as they are now. Raises ``UnsupportedByEngine``."""
    return host_topology(settings).devices


def engine_python(settings: Settings) -> str:
    """Return the interpreter that has what the engine needs: by default the daemon's own."""
    python = settings.engines.native.python
    return sys.executable if python is None else str(python)


def kv_cache_bytes(settings: Settings) -> int:
    """Return the KV capacity of the engine, over all decoders together."""
    engines = settings.engines
    return (engines.vllm if settings.engine is EngineKind.VLLM else engines.native).kv_cache_bytes


def ignore_news(_news: str) -> None:
    """Tell nobody."""


def engine_factory(
    settings: Settings, model: Model, *, on_news: Callable[[str], object] = ignore_news
) -> Callable[[Pipeline, int], Engine]:
    """Return what makes an engine, not started yet, for the pipeline and epoch to begin with.

    It looks for devices now, which may block, and the engines that it makes later are on those.

    Args:
        on_news: Told what operators should know of an engine that runs, one sentence each.
    """
    match settings.engine:
        case EngineKind.NATIVE:
            return _native(settings, model)
        case EngineKind.VLLM:
            return _Vllm(settings, model, on_news)
        case EngineKind.FAKE:
            return _fake(settings, model)
        case _:
            assert_never(settings.engine)


def _native(settings: Settings, model: Model) -> Callable[[Pipeline, int], Engine]:
    from engines.native.adapter import NativeEngine

    options = native_options(settings, model)
    return lambda pipeline, epoch: NativeEngine(options, pipeline, epoch=epoch)


def native_options(settings: Settings, model: Model) -> NativeOptions:
    """Return what the native engine is told."""
    native, handover = settings.engines.native, settings.handover
    return NativeOptions(
        model_directory=str(model.directory),
        device_ids=tuple(device.id for device in devices_of(settings)),
        device_memory_bytes=settings.devices.cpu_memory_bytes,
        python=engine_python(settings),
        dtype=settings.dtype.value,
        max_model_len=_number(settings.max_model_len),
        kv_cache_bytes=native.kv_cache_bytes,
        kv_block_tokens=native.kv_block_tokens,
        max_num_seqs=native.max_num_seqs,
        max_num_batched_tokens=native.max_num_batched_tokens,
        max_micro_batches=_number(native.max_micro_batches),
        threads=_number(native.threads),
        nice=native.nice,
        hang_deadline_s=native.hang_deadline_s,
        prepare_deadline_s=handover.prepare_deadline_s,
        sync_deadline_s=handover.sync_deadline_s,
        commit_deadline_s=handover.commit_deadline_s,
        max_rounds=handover.max_rounds,
        remainder_slots=handover.remainder_slots,
        slice_bytes=handover.slice_bytes,
        cache_directory="" if native.cache_dir is None else str(native.cache_dir),
    )


class _Vllm:
    """Makes vLLM engines. Ranks stay the same over restarts, for as long as they can run the pipeline."""

    def __init__(self, settings: Settings, model: Model, on_news: Callable[[str], object]) -> None:
        self._settings = settings
        self._model = model
        self._devices = devices_of(settings)
        self._on_news = on_news
        self._known: list[Ranks] = []  # of all instances so far, the last first

    def __call__(self, pipeline: Pipeline, epoch: int) -> Engine:
        from engines.vllm.adapter import VllmEngine

        self._refuse_too_small_a_cache()
        pipeline = self._widened(pipeline)
        ranks = next((known for known in self._known if known.refusal_of(pipeline) is None), None)
        if ranks is None:
            ranks = self._ranks_for(pipeline)
            self._known.insert(0, ranks)
        return VllmEngine(
            self._options(ranks),
            pipeline,
            epoch=epoch,
            graph=self._model.graph,
            on_log=lambda line: log_events.engine_log(
                engine="vllm", level=line.level, process=line.process, message=line.message
            ),
            on_recompiled=self._note_recompiled,
        )

    def _refuse_too_small_a_cache(self) -> None:
        """One sequence must fit. vLLM says so too, after a minute."""
        graph, wanted = self._model.graph, _number(self._settings.max_model_len)
        needed, offered = format_bytes_apart(graph.kv_bytes(wanted), self._settings.engines.vllm.kv_cache_bytes)
        if graph.kv_bytes(wanted) > self._settings.engines.vllm.kv_cache_bytes:
            raise UnsupportedByEngine(
                f"engines.vllm.kv_cache: a sequence of max_model_len {wanted} needs {needed}, offered are {offered}"
            )

    def _note_recompiled(self, ended: Recompilation) -> None:
        if ended.stall_s is None:
            log_events.engine_stays_eager(ranks=ended.ranks, reason=ended.reason)
        else:
            log_events.engine_compiled_again(
                ranks=ended.ranks,
                after_s=ended.duration_s,
                compile_s=ended.compile_s,
                load_stall_s=ended.stall_s,
            )
        self._on_news(ended.message)

    def _widened(self, pipeline: Pipeline) -> Pipeline:
        devices = [device.id for device in self._devices]
        try:
            return widened(pipeline, devices=devices, degree=self._settings.engines.vllm.tensor_parallel)
        except ValueError as error:
            raise UnsupportedByEngine(f"engines.vllm.tensor_parallel: {error}") from None

    def _ranks_for(self, pipeline: Pipeline) -> Ranks:
        vllm = self._settings.engines.vllm
        degree = vllm.tensor_parallel
        wanted = pipeline.granularity if vllm.ranks is Auto.AUTO else max(pipeline.granularity, vllm.ranks)
        taken = set(pipeline.device_ids)
        free = [device.id for device in self._devices if device.id not in taken]
        spare = [tuple(free[start : start + degree]) for start in range(0, len(free) - degree + 1, degree)]
        try:
            devices = rank_devices(pipeline, ranks=wanted, spare=spare)
            return Ranks(device_ids=devices, tensor_parallel=degree)
        except ValueError as error:
            raise UnsupportedByEngine(f"engines.served.ranks: {error}") from None

    def _options(self, ranks: Ranks) -> VllmOptions:
        settings, vllm, handover = self._settings, self._settings.engines.vllm, self._settings.handover
        graph = self._model.graph
        return VllmOptions(
            python="" if vllm.python is None else str(vllm.python),
            model_directory=str(self._model.directory),
            served_model_name=served_name(settings, model_source(settings)),
            device_ids=ranks.device_ids,
            num_decoders=graph.num_decoders,
            kv_bytes_per_token=max(decoder.kv_bytes_per_token for decoder in graph.decoders),
            device_memory_bytes=memory_of_one(self._devices),
            cuda=self._devices[0].kind is DeviceKind.CUDA,
            tensor_parallel=ranks.tensor_parallel,
            dtype=settings.dtype.value,
            max_model_len=_number(settings.max_model_len),
            tokenizer="" if settings.tokenizer is None else str(self._model.tokenizer_directory),
            trust_remote_code=settings.trust_remote_code,
            hf_token_file="" if settings.hf_token_file is None else str(settings.hf_token_file),
            kv_cache_bytes=vllm.kv_cache_bytes,
            kv_block_tokens=vllm.kv_block_tokens,
            max_num_seqs=vllm.max_num_seqs,
            max_num_batched_tokens=vllm.max_num_batched_tokens,
            threads=_number(vllm.threads),
            nice=vllm.nice,
            compile=vllm.compile,
            args=vllm.args,
            env=dict(vllm.env),
            start_deadline_s=vllm.start_deadline_s,
            hang_deadline_s=vllm.hang_deadline_s,
            prepare_deadline_s=handover.prepare_deadline_s,
            sync_deadline_s=handover.sync_deadline_s,
            commit_deadline_s=handover.commit_deadline_s,
            max_rounds=handover.max_rounds,
            remainder_slots=handover.remainder_slots,
            slice_bytes=handover.slice_bytes,
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


def _number(value: int | Auto) -> int:
    """Return a number as the engine's options have it: 0 for auto."""
    return 0 if value is Auto.AUTO else value
