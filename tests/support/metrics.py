"""The metrics of a daemon, as Prometheus would read them, and as the README names them."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import aiohttp
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from engines.protocol import EngineCounters, StageStatus

README: Final = Path(__file__).parents[2] / "README.md"
_COMMON: Final = frozenset({"le", "model"})  # of histograms, and of what is of one of several models


# What an engine says of itself, each value made up.
COUNTERS: Final = EngineCounters(**dict.fromkeys(EngineCounters.__dataclass_fields__, 1))
STAGE: Final = StageStatus(
    index=0,
    device_ids=("cpu:0",),
    first_decoder=0,
    end_decoder=3,
    pids=(1,),
    weights_bytes=1000,
    kv_mapped_bytes=200,
    busy=0.5,
)


async def metrics_of(url: str) -> Mapping[str, float]:
    """Return the daemon's metrics; of those with labels, the sum."""
    found: dict[str, float] = {}
    for name, _labels, value in await _samples(url):
        found[name] = found.get(name, 0.0) + value
    return found


async def metrics_series(url: str, name: str) -> list[tuple[Mapping[str, str], float]]:
    """Return the series of one metric, each with its labels."""
    return [(labels, value) for each, labels, value in await _samples(url) if each == name]


async def _samples(url: str) -> list[tuple[str, Mapping[str, str], float]]:
    async with aiohttp.ClientSession() as http, http.get(f"{url}/metrics") as answer:
        text = await answer.text()
    families = text_string_to_metric_families(text)
    return [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]


# --- what the README says ---


def documented_metrics(*, of_models: bool = False) -> dict[str, frozenset[str]]:
    """Return the labels of each metric that the README names; ``of_models``: of those that each model has."""
    rows = [line for line in _section().splitlines() if line.startswith("| ")][1:]  # after the head
    chosen = [row for row in rows if "a model's" in row or not of_models]
    named = [match for row in chosen for match in re.finditer(r"`([a-z_]+)(?:\{([a-z,]+)\})?`", row)]
    assert len({match[1] for match in named}) == len(named), "one is named twice"
    return {f"flexpiped_{match[1]}": frozenset((match[2] or "").split(",")) - {""} for match in named}


def documented_values() -> dict[str, frozenset[str]]:
    """Return which values a label has, of those that the README lists."""
    text = " ".join(_section().partition("Labels take")[2].split())
    return {name: frozenset(values.split(", ")) for name, values in re.findall(r"`(\w+)` is ([\w, ]+)[;.]", text)}


def _section() -> str:
    return README.read_text(encoding="utf-8").partition("Metrics all begin with")[2].partition("`etc/prometheus")[0]


# --- what a daemon tells ---


def shown_metrics(exposition: str) -> dict[str, frozenset[str]]:
    """Return the labels of each metric, but for those of every one."""
    return {name: _labels_of(family) - _COMMON for name, family in _families(exposition)}


def shown_of_models(exposition: str) -> set[str]:
    """Return the metrics that have the label ``model``."""
    return {name for name, family in _families(exposition) if "model" in _labels_of(family)}


def shown_values(exposition: str) -> dict[str, set[str]]:
    """Return which values each label has."""
    found: dict[str, set[str]] = {}
    for _name, family in _families(exposition):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found.setdefault(label, set()).add(value)
    return found


def undocumented(exposition: str) -> list[str]:
    """Return what is in an exposition that the README does not say: metrics, labels, values of labels."""
    metrics, values = documented_metrics(), documented_values()
    found = [
        f"{name}{sorted(labels)}"
        for name, labels in shown_metrics(exposition).items()
        if name not in metrics or not labels <= metrics[name]
    ]
    for label, shown in shown_values(exposition).items():
        found += [f"{label} {value}" for value in sorted(shown - values[label])] if label in values else []
    return found


def _families(exposition: str) -> Iterator[tuple[str, Metric]]:
    """Yield what is told with the name that Prometheus has for it, without what its library adds."""
    for family in text_string_to_metric_families(exposition):
        if not family.name.endswith("_created"):
            yield family.name + "_total" * (family.type == "counter"), family


def _labels_of(family: Metric) -> frozenset[str]:
    return frozenset(label for sample in family.samples for label in sample.labels)
