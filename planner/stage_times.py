"""Times of stages and hops of a pipeline, for prediction and for placement, from the costs of single layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from planner.layer_costs import (
    Batch,
    LayerClasses,
    all_reduce_s,
    decode_batch,
    layer_classes,
    prefill_batch,
    shard,
)
from planner.layout import Pipeline
from planner.model_graph import Layer, LayerKind
from planner.prediction import PipelineTimes
from planner.question import PlanQuestion
from topology.device import Device, DeviceKind
from topology.topology import pair_key


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceStep:
    """What a stage computes in one cycle of decoding under the workload: decoding, and its share of the prompts.

    Placement balances the stages for this; predictions look at every batch size.
    """

    decode: Batch
    prefill: Batch
    prefills_per_step: float  # chunks of prompts that come with one decoding step

    def tokens(self) -> float:
        """Return the tokens whose activations pass from stage to stage."""
        return self.decode.tokens + self.prefills_per_step * self.prefill.tokens


class DeviceGroups:
    """Seconds of layers on device groups, and of hops between them. Of a group the slowest device counts."""

    def __init__(self, question: PlanQuestion, *, num_stages: int, beside_others: bool = False) -> None:
        self._question = question
        self._costs = (question.costs_beside if beside_others else None) or question.costs
        self._threads = threads_per_stage(question, num_stages=num_stages)
        self._devices = {device.id: self._as_used(device) for device in question.topology.devices}

    def _as_used(self, device: Device) -> Device:
        return replace(device, threads=self._threads) if device.kind is DeviceKind.CPU and self._threads else device

    def of(self, device_ids: Sequence[str]) -> tuple[Device, ...]:
        """Return the devices, CPU devices with the threads that a stage has."""
        return tuple(self._devices[device_id] for device_id in device_ids)

    def layer_s(self, layer: Layer, device_ids: Sequence[str], batch: Batch) -> float:
        """Return the seconds of a layer on a group, with the sums of its activations over the group."""
        part = shard(layer, len(device_ids))
        slowest = max(self._costs.layer_s(part, device, batch) for device in self.distinct(device_ids))
        return slowest + self._all_reduce_s(layer, device_ids, batch)

    def stage_s(self, classes: LayerClasses, device_ids: Sequence[str], batch: Batch) -> float:
        """Return the seconds of one step of a stage."""
        overhead = max(self._costs.stage_overhead_s(device, batch) for device in self.distinct(device_ids))
        return overhead + sum(count * self.layer_s(layer, device_ids, batch) for layer, count in classes)

    def hop_s(self, from_ids: Sequence[str], to_ids: Sequence[str], tokens: float) -> float:
        """Return the seconds that the activations of ``tokens`` take from one group to the next."""
        size = self._question.graph.embedding.activation_bytes_per_token * tokens
        return self._question.topology.link(from_ids[0], to_ids[0]).seconds_for(size)

    def distinct(self, device_ids: Sequence[str]) -> tuple[Device, ...]:
        """Return one device of each kind of a group: times differ by kind only."""
        return tuple({speed_key(device): device for device in self.of(device_ids)}.values())

    def _all_reduce_s(self, layer: Layer, device_ids: Sequence[str], batch: Batch) -> float:
        degree = len(device_ids)
        if degree == 1 or layer.kind is not LayerKind.DECODER:
            return 0.0
        link = self._question.topology.link(*pair_key(device_ids[0], device_ids[-1]))
        return all_reduce_s(
            layer,
            degree=degree,
            tokens=batch.tokens,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )


def speed_key(device: Device) -> tuple[object, ...]:
    """Return what the speed of a device depends on."""
    return device.kind, device.name, device.threads


def threads_per_stage(question: PlanQuestion, *, num_stages: int) -> int:
    """Return the threads of a stage where stages share cores; 0 where they do not."""
    if question.cores is None:
        return 0
    share = max(1, question.cores // num_stages)
    return min(question.threads_per_device, share) if question.threads_per_device else share


def micro_batches(question: PlanQuestion, *, num_stages: int) -> int:
    """Return how many micro-batches are in flight: more than stages are never of use, so no engine has more."""
    return min(question.engine.micro_batches or num_stages, num_stages)


def stages_at_once(question: PlanQuestion, *, num_stages: int) -> int | None:
    """Return how many stages compute at the same time; None where each has a device of its own."""
    if question.cores is None:
        return None
    return min(num_stages, max(1, question.cores // threads_per_stage(question, num_stages=num_stages)))


def reference_step(question: PlanQuestion, *, num_stages: int) -> ReferenceStep:
    """Return the step that ``num_stages`` stages are balanced for.

    The sequences inside follow from Little's law with the time that one sequence alone would need on the first device,
    at least one and at most what the engine runs at once; they are spread over the micro-batches.
    """
    workload, engine = question.workload, question.engine
    prompt, output = workload.prompt_tokens_mean, workload.output_tokens_mean
    context = prompt + output / 2
    alone = decode_batch(sequences=1, context_tokens=context)
    groups = DeviceGroups(question, num_stages=num_stages)
    first = question.topology.devices[0].id
    pass_s = groups.stage_s(layer_classes(question.graph.layers), (first,), alone)
    inside = min(max(1.0, workload.rate_per_s * output * pass_s), float(engine.max_sequences))
    sequences = ceil(inside / min(micro_batches(question, num_stages=num_stages), inside))
    chunk = min(ceil(prompt), engine.max_step_tokens)
    prompts_per_step = sequences / output  # so many of them end in a step, and as many begin
    return ReferenceStep(
        decode=decode_batch(sequences=sequences, context_tokens=context),
        prefill=prefill_batch(tokens=chunk, context_tokens=max(float(chunk), (prompt + chunk) / 2)),
        prefills_per_step=prompts_per_step * max(1.0, prompt / chunk),
    )


def pipeline_times(question: PlanQuestion, pipeline: Pipeline, *, kv_tokens: int) -> PipelineTimes:
    """Return the times of a pipeline for ``planner.prediction``. ``kv_tokens``: the smallest over its stages."""
    engine, num_stages = question.engine, pipeline.granularity
    groups = DeviceGroups(question, num_stages=num_stages)
    beside = DeviceGroups(question, num_stages=num_stages, beside_others=True)
    stages = pipeline.stages
    classes = [layer_classes(question.graph.stage_layers(pipeline, index)) for index in range(num_stages)]
    return PipelineTimes(
        stages=tuple(_stage_time(groups, held, stage.device_ids) for held, stage in zip(classes, stages, strict=True)),
        stages_beside=()
        if question.costs_beside is None
        else tuple(_stage_time(beside, held, stage.device_ids) for held, stage in zip(classes, stages, strict=True)),
        hops=tuple(_hop_time(groups, before.device_ids, after.device_ids) for before, after in pairwise(stages)),
        kv_capacity_tokens=kv_tokens,
        max_sequences=engine.max_sequences,
        max_step_tokens=engine.max_step_tokens,
        micro_batches=micro_batches(question, num_stages=num_stages),
        stages_at_once=stages_at_once(question, num_stages=num_stages),
    )


def _stage_time(groups: DeviceGroups, held: LayerClasses, device_ids: Sequence[str]) -> Callable[[Batch], float]:
    return lambda batch: groups.stage_s(held, device_ids, batch)


def _hop_time(groups: DeviceGroups, from_ids: Sequence[str], to_ids: Sequence[str]) -> Callable[[int], float]:
    return lambda tokens: groups.hop_s(from_ids, to_ids, tokens)
