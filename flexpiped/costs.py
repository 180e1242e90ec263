"""Which layer times a plan rests on: the profile that was measured for this model and host, else the roofline."""

from collections.abc import Sequence
from dataclasses import dataclass

from flexpiped.profiles import ProfileStore, cpu_name, model_digest
from planner.layer_costs import LayerCosts
from planner.model_graph import ModelGraph
from planner.profile import MeasuredCosts
from planner.roofline import roofline_for
from topology.device import Device, DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Layer times of stages that compute alone, and of stages that compute beside others on their host.

    ``note`` says why nothing measured is used, and is empty where something is.
    """

    alone: LayerCosts
    beside: LayerCosts
    note: str = ""

    @property
    def source(self) -> str:
        """Where the times come from, as a sentence."""
        return self.alone.source


def costs_of(
    graph: ModelGraph,
    devices: Sequence[Device],
    *,
    engine: str,
    cores: int,
    store: ProfileStore,
    threads_per_device: int = 0,
    device_name: str | None = None,
) -> Costs:
    """Return the newest profile that is valid for model, engine and processor, or else a roofline for ``devices``.

    Args:
        cores: Threads of all stages together.
        threads_per_device: That a stage has at most; 0: no such bound.
        device_name: What the processor calls itself; None: ask this host.

    Raises:
        InvalidProfile: A stored profile cannot be read, or there is none and nothing is known of a device either.
    """
    profile, note = None, "profiles are measured on CPU devices only"
    if all(device.kind is DeviceKind.CPU for device in devices):
        profile, note = store.find(
            model_digest=model_digest(graph),
            dtype=graph.dtype,
            engine=engine,
            device_name=cpu_name() if device_name is None else device_name,
            cores=cores,
            threads_per_device=threads_per_device,
        )
    if profile is not None:
        return Costs(alone=MeasuredCosts(profile=profile), beside=MeasuredCosts(profile=profile, beside_others=True))
    roofline = roofline_for(devices, dtype=graph.dtype)
    return Costs(alone=roofline, beside=roofline, note=note)
