"""What watches one model's load and its neighbours, and decides when the layout changes: the parts, put together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexpiped.auto import DECISIONS_KEPT, AutoControl
from flexpiped.auto_candidates import PlannedCandidates
from flexpiped.daemon_parts import DaemonParts
from flexpiped.engine_in_force import EngineInForce
from flexpiped.events import Event, EventLog
from flexpiped.load_monitor import LoadSampler
from flexpiped.neighbourhood import Neighbourhood, constants_of
from flexpiped.planner_question import slo_of, workload_of
from flexpiped.refactoring import Refactorings
from flexpiped.settings import Settings
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelControl:
    """Of one model."""

    load: LoadSampler
    candidates: PlannedCandidates
    auto: AutoControl

    def use(self, settings: Settings) -> None:
        """Use what ``settings`` say of what is live."""
        self.candidates.expect(workload_of(settings), slo_of(settings))
        self.load.expect(slo_of(settings))


def control_of(
    settings: Settings,
    *,
    in_force: EngineInForce,
    refactorings: Refactorings,
    on_decision: Callable[[Event], object],
) -> ModelControl:
    """Return what controls the engine in force by way of ``refactorings``."""
    load = LoadSampler(
        windows_s=settings.auto.windows_s,
        memory_s=settings.auto.latency_window_s,
        stale_after_s=settings.auto.stale_after_s,
        slo=slo_of(settings),
    )
    candidates = PlannedCandidates(
        resolver=lambda: in_force.offer().resolver,
        serving=lambda: in_force.known_replicas().pipelines,
        start=lambda num_stages: in_force.offer().starts.expected(num_stages),
        expected=workload_of(settings),
        slo=slo_of(settings),
    )
    auto = AutoControl(
        settings.auto,
        engine=in_force.engine_to_change,
        load=load,
        candidates=candidates,
        refactorings=refactorings,
        rest=lambda: in_force.replicas,
        fleet=lambda: in_force.fleet.serving,
        engines=lambda: in_force.known_replicas().engines,
        decided=EventLog(capacity=DECISIONS_KEPT, on_publish=on_decision),
    )
    return ModelControl(load=load, candidates=candidates, auto=auto)


def neighbourhood_of(
    settings: Settings,
    *,
    parts: DaemonParts,
    in_force: EngineInForce,
    load: LoadSampler,
    refactorings: Refactorings,
    devices: Callable[[], Sequence[Device]],
) -> Neighbourhood:
    """Return what gives way to those who share the devices. ``devices`` looks at them, and blocks."""
    return Neighbourhood(
        constants_of(settings.devices),
        replicas=lambda: in_force.known_replicas().all,
        kv_bytes_per_token=lambda: in_force.offer().resolver.kv_bytes_per_token,
        devices=devices,
        held=parts.held,
        on_devices=load.devices_seen,
        refactorings=refactorings,
        events=parts.events,
        parameters=parts.parameters,
        models=parts.kv_of_models,
    )
