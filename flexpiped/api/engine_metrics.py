"""Stages and devices as Prometheus sees them when it asks: who does how much, and what memory is taken."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.protocol import StageStatus
from topology.device import Device


class StagesCollector(Collector):
    """One series per stage, by its place in the pipeline: no more than there are devices."""

    def __init__(self, stages: Sequence[StageStatus]) -> None:
        self._stages = stages

    def collect(self) -> Iterator[Metric]:
        busy = GaugeMetricFamily(
            "flexpiped_stage_busy_ratio", "Share of the time computing since it was last read", labels=["stage"]
        )
        decoders = GaugeMetricFamily("flexpiped_stage_decoders", "Decoder layers of a stage", labels=["stage"])
        weights = GaugeMetricFamily("flexpiped_stage_weights_bytes", "Weights that a stage holds", labels=["stage"])
        mapped = GaugeMetricFamily(
            "flexpiped_stage_kv_mapped_bytes", "KV cache of a stage that is backed by memory", labels=["stage"]
        )
        for stage in self._stages:
            labels = [str(stage.index)]
            if stage.busy is not None:  # at the first reading it is not known
                busy.add_metric(labels, stage.busy)
            decoders.add_metric(labels, stage.end_decoder - stage.first_decoder)
            weights.add_metric(labels, stage.weights_bytes)
            mapped.add_metric(labels, stage.kv_mapped_bytes)
        yield from (busy, decoders, weights, mapped)


class DevicesCollector(Collector):
    """One series per device of this host."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        total = GaugeMetricFamily("flexpiped_device_memory_bytes", "Memory of a device", labels=["device"])
        usable = GaugeMetricFamily(
            "flexpiped_device_memory_usable_bytes",
            "Memory of a device without what driver and other tenants hold",
            labels=["device"],
        )
        for device in self._devices:
            total.add_metric([device.id], device.memory_total_bytes)
            usable.add_metric([device.id], device.memory_usable_bytes)
        yield from (total, usable)
