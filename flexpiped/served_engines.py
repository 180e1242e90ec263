"""Engines with servers of their own, from settings: vLLM and SGLang. Ranks stay the same over restarts."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from engines.errors import UnsupportedByEngine
from engines.protocol import Engine
from engines.served.logs import LogLine
from engines.served.ranks import Ranks, rank_devices, widened
from engines.sglang.options import SglangOptions
from engines.sglang.pipelining import one_rank_reason
from engines.vllm.options import VllmOptions
from engines.vllm.recompile import Recompilation
from flexpiped import log_events
from flexpiped.config_values import Auto
from flexpiped.engine_factory import Model, auto_as_zero, devices_of
from flexpiped.hardware import memory_of_one
from flexpiped.kv_capacity import served_kv_bytes
from flexpiped.models import model_source, served_name
from flexpiped.settings import ServedSettings, Settings
from planner.layout import Pipeline
from topology.device import DeviceKind
from topology.units import format_bytes_apart


class ServedEngines(ABC):
    """Makes engines of one kind, on the same ranks for as long as these can run the pipeline."""

    def __init__(self, settings: Settings, model: Model, own: ServedSettings) -> None:
        self._settings = settings
        self._model = model
        self._own = own
        self._name = settings.engine.value
        self._devices = devices_of(settings)
        self._kv_bytes = served_kv_bytes(own, self._devices)
        self._known: list[Ranks] = []  # of all instances so far, the last first

    def __call__(self, pipeline: Pipeline, epoch: int) -> Engine:
        self._refuse_too_small_a_cache()
        pipeline = self._widened(pipeline)
        ranks = next((known for known in self._known if known.refusal_of(pipeline) is None), None)
        if ranks is None:
            ranks = self._ranks_for(pipeline)
            self._known.insert(0, ranks)
        return self._make(ranks, pipeline, epoch)

    @abstractmethod
    def _make(self, ranks: Ranks, pipeline: Pipeline, epoch: int) -> Engine:
        """Return an engine on these ranks."""

    def _common(self, ranks: Ranks) -> dict[str, Any]:
        """Return what both kinds of options have, by the same names."""
        settings, own, handover, graph = self._settings, self._own, self._settings.handover, self._model.graph
        return {
            "python": "" if own.python is None else str(own.python),
            "model_directory": str(self._model.directory),
            "served_model_name": served_name(settings, model_source(settings)),
            "device_ids": ranks.device_ids,
            "num_decoders": graph.num_decoders,
            "kv_bytes_per_token": max(decoder.kv_bytes_per_token for decoder in graph.decoders),
            "device_memory_bytes": memory_of_one(self._devices),
            "cuda": self._devices[0].kind is DeviceKind.CUDA,
            "tensor_parallel": ranks.tensor_parallel,
            "dtype": settings.dtype.value,
            "max_model_len": auto_as_zero(settings.max_model_len),
            "tokenizer": "" if settings.tokenizer is None else str(self._model.tokenizer_directory),
            "trust_remote_code": settings.trust_remote_code,
            "hf_token_file": "" if settings.hf_token_file is None else str(settings.hf_token_file),
            "kv_cache_bytes": self._kv_bytes,
            "kv_block_tokens": own.kv_block_tokens,
            "max_num_seqs": own.max_num_seqs,
            "max_num_batched_tokens": own.max_num_batched_tokens,
            "threads": auto_as_zero(own.threads),
            "nice": own.nice,
            "args": own.args,
            "env": dict(own.env),
            "start_deadline_s": own.start_deadline_s,
            "hang_deadline_s": own.hang_deadline_s,
            "prepare_deadline_s": handover.prepare_deadline_s,
            "sync_deadline_s": handover.sync_deadline_s,
            "commit_deadline_s": handover.commit_deadline_s,
            "max_rounds": handover.max_rounds,
            "remainder_slots": handover.remainder_slots,
            "slice_bytes": handover.slice_bytes,
        }

    def _log(self, line: LogLine) -> None:
        log_events.engine_log(engine=self._name, level=line.level, process=line.process, message=line.message)

    def _refuse_too_small_a_cache(self) -> None:
        """One sequence must fit. The engine says so too, after a minute."""
        graph, wanted = self._model.graph, auto_as_zero(self._settings.max_model_len)
        needed, offered = format_bytes_apart(graph.kv_bytes(wanted), self._kv_bytes)
        if graph.kv_bytes(wanted) > self._kv_bytes:
            raise UnsupportedByEngine(
                f"engines.{self._name}.kv_cache: a sequence of max_model_len {wanted} needs {needed}, "
                f"offered are {offered}"
            )

    def _widened(self, pipeline: Pipeline) -> Pipeline:
        devices = [device.id for device in self._devices]
        try:
            return widened(pipeline, devices=devices, degree=self._own.tensor_parallel)
        except ValueError as error:
            raise UnsupportedByEngine(f"engines.{self._name}.tensor_parallel: {error}") from None

    def _ranks_for(self, pipeline: Pipeline) -> Ranks:
        degree, ranks = self._own.tensor_parallel, self._own.ranks
        wanted = pipeline.granularity if ranks is Auto.AUTO else max(pipeline.granularity, ranks)
        taken = set(pipeline.device_ids)
        free = [device.id for device in self._devices if device.id not in taken]
        spare = [tuple(free[start : start + degree]) for start in range(0, len(free) - degree + 1, degree)]
        try:
            devices = rank_devices(pipeline, ranks=wanted, spare=spare)
            return Ranks(device_ids=devices, tensor_parallel=degree)
        except ValueError as error:
            raise UnsupportedByEngine(f"engines.{self._name}.ranks: {error}") from None


class VllmEngines(ServedEngines):
    """Makes vLLM engines.

    Args:
        on_news: Told what operators should know of an engine that runs, one sentence each.
    """

    def __init__(self, settings: Settings, model: Model, on_news: Callable[[str], object]) -> None:
        super().__init__(settings, model, settings.engines.vllm)
        self._on_news = on_news

    def _make(self, ranks: Ranks, pipeline: Pipeline, epoch: int) -> Engine:
        from engines.vllm.adapter import VllmEngine

        options = VllmOptions(**self._common(ranks), compile=self._settings.engines.vllm.compile)
        return VllmEngine(
            options,
            pipeline,
            epoch=epoch,
            graph=self._model.graph,
            on_log=self._log,
            on_recompiled=self._note_recompiled,
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


class SglangEngines(ServedEngines):
    """Makes SGLang engines."""

    def __init__(self, settings: Settings, model: Model) -> None:
        super().__init__(settings, model, settings.engines.sglang)

    def _make(self, ranks: Ranks, pipeline: Pipeline, epoch: int) -> Engine:
        from engines.sglang.adapter import SglangEngine

        graph = self._model.graph
        if ranks.count > 1 and (reason := one_rank_reason(graph.model_type, tied=graph.tied)):
            raise UnsupportedByEngine(f"stages and engines.sglang.ranks ask for {ranks.count} pipeline ranks: {reason}")
        options = SglangOptions(**self._common(ranks), max_positions=graph.max_context_tokens)
        return SglangEngine(options, pipeline, epoch=epoch, graph=graph, on_log=self._log)
