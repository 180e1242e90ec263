"""What a layer costs on a device: the interface that every consumer of times uses, whichever way they were found.

``planner.profile`` answers from measurements, ``planner.roofline`` from a device's figures; ``source`` says which.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from planner.model_graph import Layer, LayerKind
from topology.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step computes: ``tokens`` of ``sequences`` together, alike in length.

    ``context_tokens`` is what the sequences have in the KV cache after the step, all together, the step's own tokens
    included: a prompt of 100 tokens in one piece is ``Batch(tokens=100, sequences=1, context_tokens=100)``.
    """

    tokens: int
    sequences: int
    context_tokens: float

    def __post_init__(self) -> None:
        if not (0 < self.sequences <= self.tokens <= self.context_tokens):
            raise ValueError(f"impossible batch: {self}")

    def attended(self, window_tokens: int | None = None) -> float:
        """Return the pairs of a token and one that it attends to, itself included; a window bounds each token's."""
        own, context = self.tokens / self.sequences, self.context_tokens / self.sequences
        beyond = 0.0 if window_tokens is None else min(own, max(0.0, context - window_tokens))
        within = own - beyond
        pairs = within * (2 * (context - beyond) - within + 1) / 2 + beyond * (window_tokens or 0)
        return self.sequences * pairs

    def cached(self, window_tokens: int | None = None) -> float:
        """Return the tokens whose keys and values are read at least once."""
        context = self.context_tokens / self.sequences
        own = self.tokens / self.sequences
        return self.sequences * (context if window_tokens is None else min(context, window_tokens + own - 1))


def decode_batch(*, sequences: int, context_tokens: float) -> Batch:
    """Return a step that computes one token for each of ``sequences``, each with ``context_tokens`` after it."""
    return Batch(tokens=sequences, sequences=sequences, context_tokens=sequences * max(1.0, context_tokens))


def prefill_batch(*, tokens: int, context_tokens: float | None = None) -> Batch:
    """Return a step over ``tokens`` of one prompt, of which ``context_tokens`` are in the cache afterwards."""
    return Batch(tokens=tokens, sequences=1, context_tokens=tokens if context_tokens is None else context_tokens)


class LayerCosts(Protocol):
    """Times of layers on devices. Cheap: a plan asks thousands of times."""

    @property
    def source(self) -> str:
        """Where the times come from, as a sentence for people: measured, when and how well, or estimated."""

    def layer_s(self, layer: Layer, device: Device, batch: Batch) -> float:
        """Return the seconds that ``layer`` takes on ``device`` for one step.

        Raises:
            InvalidProfile: There are no figures for such a layer or device.
        """

    def stage_overhead_s(self, device: Device, batch: Batch) -> float:
        """Return the seconds of one step that a stage takes beside its layers: reading, passing on."""


LayerClasses = tuple[tuple[Layer, int], ...]


def layer_classes(layers: Collection[Layer]) -> LayerClasses:
    """Return the distinct kinds among ``layers`` with their numbers: the 80 decoders of a model are mostly alike."""
    return tuple(Counter(replace(layer, name=layer.kind.value, tensor_names=()) for layer in layers).items())


def stage_s(costs: LayerCosts, classes: LayerClasses, device: Device, batch: Batch) -> float:
    """Return the seconds of one step of a stage that holds ``classes``. Raises as ``LayerCosts.layer_s``."""
    layers = sum(count * costs.layer_s(layer, device, batch) for layer, count in classes)
    return layers + costs.stage_overhead_s(device, batch)


def shard(layer: Layer, degree: int) -> Layer:
    """Return the share of ``layer`` that each of ``degree`` tensor-parallel devices computes and holds.

    What is not split (norms, the activations that are summed over the devices) is small and counted as split, too.
    """
    if degree < 1:
        raise ValueError(f"a tensor-parallel degree is at least 1, not {degree}")
    if degree == 1:
        return layer
    experts = layer.experts
    return replace(
        layer,
        weight_bytes=-(-layer.weight_bytes // degree),
        kv_bytes_per_token=-(-layer.kv_bytes_per_token // degree),
        workspace_bytes_per_token=-(-layer.workspace_bytes_per_token // degree),
        flops_per_token=-(-layer.flops_per_token // degree),
        attention_flops_per_context_token=-(-layer.attention_flops_per_context_token // degree),
        experts=None if experts is None else replace(experts, bytes_each=-(-experts.bytes_each // degree)),
    )


def all_reduce_s(layer: Layer, *, degree: int, tokens: int, bandwidth_bytes_per_s: float, latency_s: float) -> float:
    """Return what the ``degree`` devices of a stage spend on summing one decoder's activations, twice a decoder.

    A ring: ``2 (degree - 1)`` messages of a ``degree``-th each. Other layers gather once, which is neglected.
    """
    if degree == 1 or layer.kind is not LayerKind.DECODER:
        return 0.0
    num_bytes = layer.activation_bytes_per_token * tokens
    once = 2 * (degree - 1) * (num_bytes / degree / bandwidth_bytes_per_s + latency_s)
    return 2 * once
