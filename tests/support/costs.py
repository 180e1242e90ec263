"""Layer times for tests that need no measurement: so many seconds for a layer on a kind of device, per token."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.layer_costs import Batch
from planner.model_graph import Layer, LayerKind
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatCosts:
    """A decoder takes ``decoder_s`` and ``token_s`` for each token, embedding and head nothing; times the slowness."""

    decoder_s: float = 1e-3
    token_s: float = 1e-5
    overhead_s: float = 0.0
    slowness: Mapping[str, float] = field(default_factory=dict)  # by product name

    @property
    def source(self) -> str:
        return "made up for a test"

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        if layer.kind is not LayerKind.DECODER:
            return 0.0
        return (self.decoder_s + self.token_s * batch.tokens) * self.slowness.get(device.name, 1.0)

    def stage_overhead_s(self, device: Device, batch: Batch) -> float:  # noqa: ARG002
        return self.overhead_s
