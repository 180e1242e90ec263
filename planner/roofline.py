"""Layer times from the figures of a device alone: what stands in until a profile has been measured.

A layer takes as long as reading its bytes or doing its arithmetic, whichever is more, and its kernel launches besides.
Decoding reads all weights for few tokens, so bandwidth bounds it; a long prompt is bound by arithmetic.

Source: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009. Real kernels reach neither bound; the shares
below are round figures of GEMM and copy benchmarks, and the launches those of a decoder without graph capture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from planner.layer_costs import Batch
from planner.model_graph import Layer, LayerKind
from topology.device import Device, DeviceKind

BANDWIDTH_REACHED = 0.8  # of the published figure
FLOPS_REACHED = 0.6
LAUNCHES = {LayerKind.EMBEDDING: 2, LayerKind.DECODER: 14, LayerKind.HEAD: 4}  # kernels a layer
LAUNCH_S = {DeviceKind.CPU: 8e-6, DeviceKind.CUDA: 5e-6}  # an operator of torch on the CPU; a CUDA kernel
STAGE_OVERHEAD_S = {DeviceKind.CPU: 100e-6, DeviceKind.CUDA: 150e-6}  # reading a message, preparing a step, passing on


class DeviceFigures(Protocol):
    """What a roofline needs to know of a device."""

    @property
    def memory_bandwidth_bytes_per_s(self) -> float: ...

    @property
    def flops_per_s(self) -> Mapping[str, float]:
        """Peak by dtype."""

    @property
    def is_estimate(self) -> bool:
        """Whether the figures are guessed from the kind of device, not published or measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Implements ``LayerCosts``. ``figures_of`` answers for every device that is asked about."""

    dtype: str
    figures_of: Callable[[Device], DeviceFigures]
    figures_named: str = "the devices' published bandwidth and FLOPs"

    @property
    def source(self) -> str:
        return (
            f"not measured: roofline estimate for {self.dtype} from {self.figures_named} "
            f"({BANDWIDTH_REACHED:.0%} and {FLOPS_REACHED:.0%} of them reached); flexctl profile measures"
        )

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        """Return the larger of memory time and arithmetic time, and the launches."""
        figures = self.figures_of(device)
        rows = batch.sequences if layer.kind is LayerKind.HEAD else batch.tokens
        attended = batch.attended(layer.window_tokens)
        flops = rows * layer.flops_per_token + attended * layer.attention_flops_per_context_token
        kv = layer.kv_bytes_per_token * (
            batch.cached(layer.window_tokens) + batch.tokens
        )  # read, and the new ones written
        num_bytes = layer.weight_bytes_read(rows) + kv + 2 * rows * layer.activation_bytes_per_token
        memory_s = num_bytes / (BANDWIDTH_REACHED * figures.memory_bandwidth_bytes_per_s)
        peak = figures.flops_per_s.get(self.dtype) or max(figures.flops_per_s.values())
        arithmetic_s = flops / (FLOPS_REACHED * peak)
        return max(memory_s, arithmetic_s) + LAUNCHES[layer.kind] * LAUNCH_S[device.kind]

    def stage_overhead_s(self, device: Device, batch: Batch) -> float:  # noqa: ARG002
        return STAGE_OVERHEAD_S[device.kind]
