"""Stages, devices and kept parameters as Prometheus sees them when it asks: who does how much, and takes what."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.parameters.figures import CacheFigures
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


class ParametersCollector(Collector):
    """What stays in host memory of layers' parameters."""

    def __init__(self, figures: CacheFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        now = self._figures
        for name, text, reading in (
            ("bytes", "Parameters kept in host memory", now.held_bytes),
            ("idle_bytes", "Of those, parameters that no stage has now", now.idle_bytes),
            ("budget_bytes", "What they may take (devices.parameter_cache)", now.budget_bytes),
            ("layers", "Layers whose parameters are kept", now.layers),
        ):
            yield GaugeMetricFamily(f"flexpiped_parameter_cache_{name}", text, value=reading)
        for name, text, total in (
            ("hits", "Layers that a stage found in host memory", now.hits_total),
            ("misses", "Layers that a stage had to read or convert", now.misses_total),
            ("given_up", "Layers given up for others, or for other tenants", now.given_up_total),
            ("refused", "Layers that there was no room for", now.refused_total),
        ):
            yield CounterMetricFamily(f"flexpiped_parameter_cache_{name}", text, value=total)
