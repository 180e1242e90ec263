"""Engines with servers of their own, from settings: vLLM and SGLang. Ranks stay the same over restarts."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import engines.sglang.command
import engines.vllm.command
from engines.errors import UnsupportedByEngine
from engines.outliving import Outliving
from engines.protocol import Engine
from engines.records import Purpose
from engines.served.adopting import AdoptedServer
from engines.served.keeper_messages import protocol_digest
from engines.served.logs import LogLine
from engines.served.options import ServedOptions
from engines.served.plugin_path import SHARED
from engines.served.ranks import Ranks, rank_devices, widened
from engines.sglang import pipelining as sglang_pipelining
from engines.sglang.options import SglangOptions
from engines.vllm import pipelining as vllm_pipelining
from engines.vllm.options import VllmOptions
from engines.vllm.recompile import Recompilation
from flexpiped import log_events
from flexpiped.config_values import Auto
from flexpiped.engine_factory import Model, auto_as_zero, devices_of, ignore_news
from flexpiped.hardware import memory_of_one
from flexpiped.kv_capacity import served_kv_bytes
from flexpiped.models import model_source, served_name
from flexpiped.settings import EngineKind, ServedSettings, Settings
from flexpiped.survivors import Survivors, purpose_of
from planner.layout import Pipeline
from topology.device import DeviceKind
from topology.units import format_bytes_apart


class ServedEngines(ABC):
    """Makes engines of one kind, on the same ranks for as long as these can run the pipeline.

    Args:
        survivors: Engines that were there before the daemon, and outlive it; None: there are none.
        parameters: Address of the keeper of parameters; empty: there is none.
    """

    def __init__(
        self, settings: Settings, model: Model, own: ServedSettings, survivors: Survivors | None, *, parameters: str
    ) -> None:
        self._settings = settings
        self._model = model
        self._own = own
        self._parameters = parameters
        self._name = settings.engine.value
        self._devices = devices_of(settings)
        self._kv_bytes = served_kv_bytes(own, self._devices)
        self._known: list[Ranks] = []  # of all instances so far, the last first
        self._survivors = survivors
        self._purpose = None if survivors is None else self.purpose()

    def __call__(self, pipeline: Pipeline, epoch: int) -> Engine:
        self._refuse_too_small_a_cache()
        pipeline = self._widened(pipeline)
        outliving = self._outliving_of(pipeline)
        if isinstance(outliving, AdoptedServer):
            self._known.insert(0, outliving.ranks)
        ranks = next((known for known in self._known if known.refusal_of(pipeline) is None), None)
        if ranks is None:
            ranks = self._ranks_for(pipeline)
            self._known.insert(0, ranks)
        if ranks.count > 1 and (reason := self._one_rank_reason):
            asked = f"stages and engines.{self._name}.ranks ask for {ranks.count} pipeline ranks"
            raise UnsupportedByEngine(f"{asked}: {reason}")
        return self._make(ranks, pipeline, epoch, outliving)

    def purpose(self) -> Purpose:
        """Return what such an engine is for, so that only one like it is adopted. Reads files, so it blocks."""
        no_ranks = Ranks(device_ids=("",))  # which they are, the engine itself says
        options = msgspec.structs.replace(self._options(no_ranks), parameters="")  # whichever daemon keeps them
        told = msgspec.msgpack.encode((options, self._own.ranks, self._own.tensor_parallel))
        return purpose_of(
            self._settings,
            directory=self._model.directory,
            options=hashlib.sha256(told).hexdigest(),
            protocol=_protocol_digest(self._plugin),
        )

    @property
    @abstractmethod
    def _plugin(self) -> Path:
        """The folder of our plugin inside such an engine."""

    @property
    @abstractmethod
    def _one_rank_reason(self) -> str:
        """Why such an engine runs the model in one pipeline rank only; empty: it may have more."""

    @abstractmethod
    def _options(self, ranks: Ranks) -> ServedOptions:
        """Return what an engine on these ranks is told."""

    @abstractmethod
    def _make(
        self, ranks: Ranks, pipeline: Pipeline, epoch: int, outliving: Outliving | AdoptedServer | None
    ) -> Engine:
        """Return an engine on these ranks."""

    def _outliving_of(self, pipeline: Pipeline) -> Outliving | AdoptedServer | None:
        if self._survivors is None or self._purpose is None:
            return None
        outliving = self._survivors.outliving_of(self._purpose, pipeline)
        assert outliving is None or isinstance(outliving, Outliving | AdoptedServer), "what is found is of this kind"
        return outliving

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
            "parameters": self._parameters,
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
        parameters: As ``ServedEngines`` has it.
    """

    _plugin = engines.vllm.command.PLUGIN

    def __init__(
        self,
        settings: Settings,
        model: Model,
        survivors: Survivors | None = None,
        on_news: Callable[[str], object] = ignore_news,
        *,
        parameters: str = "",
    ) -> None:
        super().__init__(settings, model, settings.engines.vllm, survivors, parameters=parameters)
        self._on_news = on_news

    def _options(self, ranks: Ranks) -> VllmOptions:
        return VllmOptions(**self._common(ranks), compile=self._settings.engines.vllm.compile)

    def _make(
        self, ranks: Ranks, pipeline: Pipeline, epoch: int, outliving: Outliving | AdoptedServer | None
    ) -> Engine:
        from engines.vllm.adapter import VllmEngine

        return VllmEngine(
            self._options(ranks),
            pipeline,
            epoch=epoch,
            graph=self._model.graph,
            on_log=self._log,
            on_recompiled=self._note_recompiled,
            outliving=outliving,
        )

    @property
    def _one_rank_reason(self) -> str:
        return vllm_pipelining.one_rank_reason(self._model.graph.model_type, args=self._own.args)

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

    _plugin = engines.sglang.command.PLUGIN

    def __init__(
        self, settings: Settings, model: Model, survivors: Survivors | None = None, *, parameters: str = ""
    ) -> None:
        super().__init__(settings, model, settings.engines.sglang, survivors, parameters=parameters)

    def _options(self, ranks: Ranks) -> SglangOptions:
        return SglangOptions(**self._common(ranks), max_positions=self._model.graph.max_context_tokens)

    def _make(
        self, ranks: Ranks, pipeline: Pipeline, epoch: int, outliving: Outliving | AdoptedServer | None
    ) -> Engine:
        from engines.sglang.adapter import SglangEngine

        return SglangEngine(
            self._options(ranks),
            pipeline,
            epoch=epoch,
            graph=self._model.graph,
            on_log=self._log,
            outliving=outliving,
        )

    @property
    def _one_rank_reason(self) -> str:
        graph = self._model.graph
        return sglang_pipelining.one_rank_reason(graph.model_type, tied=graph.tied, args=self._own.args)


def served_purpose(settings: Settings, model: Model) -> Purpose:
    """Return what the configured engine with a server of its own is for. Reads files, so it blocks."""
    made = SglangEngines(settings, model) if settings.engine is EngineKind.SGLANG else VllmEngines(settings, model)
    return made.purpose()


def _protocol_digest(plugin: Path) -> str:
    """Return what tells how one speaks with an engine from how another version does: by all of what runs inside it."""
    digest = hashlib.sha256(protocol_digest().encode())
    for folder in (plugin, SHARED):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
