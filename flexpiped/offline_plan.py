"""A plan without a daemon: for any topology, any model directory and any workload, from files alone."""

import json
import os
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from engines.checkpoint import WEIGHTS, WEIGHTS_INDEX, find_model, read_checkpoint, read_config
from engines.native.text_part import text_part
from flexpiped.config_file import load_config
from flexpiped.hardware import host_topology
from flexpiped.models import model_source
from flexpiped.plan_wire import answer_to_wire
from flexpiped.planner_question import known_costs, question_of
from flexpiped.settings import EngineKind, Settings
from flexpiped.start_times import start_times_of
from planner.errors import InvalidWorkload, UnsupportedModel
from planner.estimated_graph import estimate_model_graph
from planner.model_graph import ModelGraph, build_model_graph
from planner.planning import plan
from planner.question import PlanQuestion
from planner.start_times import StartRecord
from planner.workload import parse_workload
from topology.device import DeviceKind
from topology.machines import load_topology
from topology.measured import state_file

_DEGREES: Final = (1, 2, 4, 8)  # that vLLM and SGLang are asked to take


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRequest:
    """What is typed. Empty or None: the configuration's, or the default."""

    config: str = ""
    topology: str = ""  # a snapshot file, or a machine that comes with flexpiped
    model: str = ""
    workload: str = ""
    engine: str = ""
    num_stages: int | None = None
    max_replicas: int = 1


def offline_plan(request: OfflineRequest) -> dict[str, Any]:
    """Return the plan as JSON values.

    Raises:
        ConfigError, BadSnapshot, PlannerError, EngineError: One of the files, or what is asked, cannot be used.
    """
    question = offline_question(request)
    began_s = time.monotonic()
    return answer_to_wire(plan(question, clock=time.monotonic), took_s=time.monotonic() - began_s)


def offline_question(request: OfflineRequest) -> PlanQuestion:
    """Return what is asked. On GPUs that are not the daemon's the KV cache takes what is left, and groups are tried.

    Raises as ``offline_plan``, but nothing of the planner's.
    """
    settings = _settings(request)
    topology = load_topology(request.topology) if request.topology else host_topology(settings)
    graph = _graph(settings, _directory(settings, request.model or model_source(settings)))
    costs = known_costs(settings, graph=graph, topology=topology)
    question = question_of(settings, graph=graph, topology=topology, costs=costs)
    engine = question.engine
    if any(device.kind is DeviceKind.CUDA for device in topology.devices):
        degrees = (1,) if settings.engine is EngineKind.NATIVE else _DEGREES
        max_stages = engine.max_stages if engine.stages_reason else len(topology.devices)
        engine = replace(engine, max_stages=max_stages, degrees=degrees, micro_batches=0, kv_tokens=None)
    if request.workload:
        workload, slo = parse_workload(_read_table(Path(request.workload)))
        question = replace(question, workload=workload, slo=slo)
    return replace(question, engine=engine, num_stages=request.num_stages, max_replicas=request.max_replicas)


def measured_starts(request: OfflineRequest, *, state_folder: Path | None = None) -> tuple[StartRecord, ...]:
    """Return how long replicas of the model took to start on this host; a topology from a file is another one.

    ``state_folder`` None: where this user's or service's state is kept. Raises as ``offline_question``.
    """
    if request.topology:
        return ()
    settings = _settings(request)
    directory = _directory(settings, request.model or model_source(settings))
    folder = state_folder or state_file(os.environ, home=Path.home()).parent
    graph = _graph(settings, directory)
    return start_times_of(graph, directory, engine=settings.engine.value, state_folder=folder).records


def _settings(request: OfflineRequest) -> Settings:
    settings = load_config(Path(request.config)) if request.config else Settings()
    return replace(settings, engine=EngineKind(request.engine)) if request.engine else settings


def _directory(settings: Settings, source: str) -> Path:
    return find_model(source, revision=settings.revision, token_file=settings.hf_token_file)


def _graph(settings: Settings, directory: Path) -> ModelGraph:
    """Describe a model: from its config.json alone where no weights lie beside it."""
    if not any((directory / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)):
        return build_model_graph(read_config(directory), dtype=settings.dtype.value)
    checkpoint = read_checkpoint(directory)
    if settings.engine is EngineKind.NATIVE:
        checkpoint = text_part(checkpoint)
    try:
        return build_model_graph(checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value)
    except UnsupportedModel:
        return estimate_model_graph(checkpoint.config, checkpoint.tensors, dtype=settings.dtype.value)


def _read_table(path: Path) -> Mapping[str, object]:
    """Return the table in a JSON or TOML file.

    Raises:
        InvalidWorkload: It cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise InvalidWorkload(f"{path}: {error.strerror}") from None
    except ValueError as error:  # JSON, TOML or UTF-8
        raise InvalidWorkload(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise InvalidWorkload(f"{path}: must hold a table, not a {type(table).__name__}")
    return table
