"""The metrics of a daemon, as Prometheus would read them."""

from collections.abc import Mapping

import aiohttp
from prometheus_client.parser import text_string_to_metric_families


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
