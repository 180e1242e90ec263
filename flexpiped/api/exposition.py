"""Metrics of several models as one text for Prometheus: each family once, its series told apart by a label."""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Families = Iterable[Iterable[Metric]]


def exposition(*parts: Families) -> bytes:
    """Return everything in Prometheus's text format; families of one name become one."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(parts))
    return generate_latest(registry)


def labelled(families: Families, model: str) -> Families:
    """Return the families with the label ``model`` on every series; an empty name adds none."""
    return families if not model else ([_with_label(each, model) for each in part] for part in families)


def _with_label(family: Metric, model: str) -> Metric:
    made = Metric(family.name, family.documentation, family.type, family.unit)
    made.samples = [sample._replace(labels={"model": model, **sample.labels}) for sample in family.samples]
    return made


class _Merged(Collector):
    def __init__(self, parts: Iterable[Families]) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for families in self._parts:
            for family in (each for part in families for each in part):
                if family.name not in merged:
                    merged[family.name] = Metric(family.name, family.documentation, family.type, family.unit)
                merged[family.name].samples.extend(family.samples)
        yield from merged.values()
