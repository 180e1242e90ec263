"""Layer times from the figures of a device alone: what stands in until a profile has been measured.

A layer takes as long as reading its bytes or doing its arithmetic, whichever is more, and its kernel launches besides.
Decoding reads all weights for few tokens, so bandwidth bounds it; a long prompt is bound by arithmetic.

Source: Williams, Waterman, Patterson, Roofline, CACM 52(4), 2009. Real kernels reach neither bound; the shares
below are round figures of GEMM and copy benchmarks, and the launches those of a decoder without graph capture.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from planner.errors import InvalidProfile
from planner.layer_costs import Batch
from planner.model_graph import Layer, LayerKind
from topology.device import Device, DeviceKind
from topology.gpu_specs import spec_of

F = TypeVar("F")
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
    """Implements ``LayerCosts``; ``roofline_for`` makes one that can answer for given devices."""

    dtype: str
    figures_of: Callable[[Device], DeviceFigures | None] = spec_of
    figures_named: str = "the devices' published bandwidth and FLOPs"

    @property
    def source(self) -> str:
        return (
            f"not measured: roofline estimate for {self.dtype} from {self.figures_named} "
            f"({BANDWIDTH_REACHED:.0%} and {FLOPS_REACHED:.0%} of them reached); flexctl profile measures"
        )

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        """Return the larger of memory time and arithmetic time, and the launches. Raises ``InvalidProfile``."""
        figures = _required(self.figures_of(device), device)
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


def roofline_for(devices: Iterable[Device], *, dtype: str) -> Roofline:
    """Return a roofline for ``devices``, whose source says which figures it rests on and which of them are guesses.

    Raises:
        InvalidProfile: Nothing is known of a device; the message names it.
    """
    published: dict[str, None] = {}
    guessed: dict[str, None] = {}
    for device in devices:
        figures = _required(spec_of(device), device)
        (guessed if figures.is_estimate else published)[figures.name] = None
    parts = [f"published bandwidth and FLOPs of {', '.join(published)}"] if published else []
    parts += [f"guessed bandwidth and FLOPs of {', '.join(guessed)}"] if guessed else []
    return Roofline(dtype=dtype, figures_named=" and ".join(parts) or "no devices")


def _required(figures: F | None, device: Device) -> F:
    if figures is None:
        raise InvalidProfile(
            f"no bandwidth and FLOPs are known of {device.name or device.id}: measure with flexctl profile"
        )
    return figures
