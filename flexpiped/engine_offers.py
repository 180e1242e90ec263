"""The engines that could serve the model: the configured one, and those that a replica handover could put in its place.

What an engine is to be told comes from its own part of the configuration, whichever engine the daemon started with.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from engines.errors import UnsupportedByEngine
from engines.parameters.keeper import ParameterKeeper
from engines.served.environment import kept_under
from flexpiped.device_sharing import Held
from flexpiped.engine_factory import Model, engine_factory, find_files, ignore_news
from flexpiped.planner_question import question_here
from flexpiped.settings import EngineKind, Settings
from flexpiped.start_times import StartTimes, start_times_of
from flexpiped.supervisor import EngineFactory
from flexpiped.survivors import Survivors
from flexpiped.target_resolver import PlannerResolver
from planner.start_times import Origin
from topology.measured import state_file


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOffer:
    """One kind of engine for the model that is served: what makes it, what plans for it, and how long it starts."""

    factory: EngineFactory
    resolver: PlannerResolver
    starts: StartTimes


class EngineOffers:
    """Makes each offer once. ``of`` may be called from any thread; it reads headers of the model's files.

    Args:
        source: Of the model.
        model: As the configured engine has it.
        on_news: Told what operators should know of an engine that runs, one sentence each.
        on_plan: Told how many seconds each plan took, in the thread that planned.
        held: What other models hold of the devices, asked anew for each plan in the thread that plans.
        adapter_bytes: What each device has of adapters that came while engines served; asked for likewise.
        survivors: Engines that were there before the daemon, and outlive it.
        parameters: Keeps some in the memory of the host.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        source: str,
        model: Model,
        on_news: Callable[[str], object] = ignore_news,
        on_plan: Callable[[float], object] = lambda _took_s: None,
        held: Callable[[], Held] = dict,
        adapter_bytes: Callable[[], int] = lambda: 0,
        survivors: Survivors | None = None,
        parameters: ParameterKeeper | None = None,
    ) -> None:
        self._parameters = parameters
        self._on_plan = on_plan
        self._held = held
        self._adapter_bytes = adapter_bytes
        self._survivors = survivors
        self._settings = settings
        self._source = source
        self._on_news = on_news
        self._made = {settings.engine: self._offer(settings, model)}

    def use(self, settings: Settings) -> None:
        """Plan from now on for the workload, targets and planner's limits of ``settings``; the rest stays."""
        self._settings = replace(self._settings, workload=settings.workload, slo=settings.slo, planner=settings.planner)

    def origins(self) -> dict[str, Origin]:
        """Return where each engine that was made would have the parameters from now. Blocks for a millisecond."""
        return {kind.value: offer.starts.origin for kind, offer in tuple(self._made.items())}

    def _kept_share(self, kind: EngineKind, model: Model) -> float:
        """Return which share of the parameters is held as an engine takes them: each has a form of its own."""
        if self._parameters is None:
            return 0.0
        directory = str(model.directory)
        of = directory if kind is EngineKind.NATIVE else kept_under(kind.value, directory)
        kept = self._parameters.kept.bytes_of(of)
        # What describes kept layers counts, too; and a head that is tied to the embedding is kept twice.
        return min(1.0, kept / sum(layer.weight_bytes for layer in model.graph.layers))

    def _planned_for(self, settings: Settings) -> Settings:
        now = self._settings
        return replace(settings, workload=now.workload, slo=now.slo, planner=now.planner)

    def of(self, name: str) -> EngineOffer:
        """Return the engine of that name.

        Raises:
            UnsupportedByEngine: There is none, it is not configured, or it cannot serve this model.
            EngineError: The model's files are not here any more.
        """
        kind = next((kind for kind in EngineKind if kind.value == name), None)
        if kind in self._made:
            return self._made[kind]
        if kind is None or kind is EngineKind.FAKE:
            raise UnsupportedByEngine(f"there is no engine {name!r} that could serve this model")
        self._refuse_without_interpreter(kind)
        settings = replace(self._settings, engine=kind)
        made = self._offer(settings, find_files(settings, source=self._source))
        return self._made.setdefault(kind, made)

    def _refuse_without_interpreter(self, kind: EngineKind) -> None:
        engines = self._settings.engines
        if kind is EngineKind.VLLM and engines.vllm.python is None:
            raise UnsupportedByEngine('engine "vllm" needs engines.vllm.python: an interpreter that has vLLM')
        if kind is EngineKind.SGLANG and engines.sglang.python is None:
            raise UnsupportedByEngine('engine "sglang" needs engines.sglang.python: an interpreter that has SGLang')

    def _offer(self, settings: Settings, model: Model) -> EngineOffer:
        address = "" if self._parameters is None else self._parameters.address
        return EngineOffer(
            factory=engine_factory(
                settings, model, on_news=self._on_news, survivors=self._survivors, parameters=address
            ),
            resolver=PlannerResolver(
                lambda: question_here(
                    self._planned_for(settings), model.graph, held=self._held(), adapter_bytes=self._adapter_bytes()
                ),
                on_plan=self._on_plan,
            ),
            starts=start_times_of(
                model.graph,
                model.directory,
                engine=settings.engine.value,
                state_folder=state_file(os.environ, home=Path.home()).parent,
                kept_share=lambda: self._kept_share(settings.engine, model),
            ),
        )
