"""Measured figures of links: kept in the state directory, and put in place of published ones at the next discovery."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec

from topology.errors import NotMeasured
from topology.link import Link
from topology.state_files import replace_file
from topology.topology import HostTopology, PairKey, pair_key

FILE_NAME: Final = "links.json"
_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPair:
    """What was measured between two devices."""

    a: str
    b: str
    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth_bytes_per_s < float("inf") or not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"{self.a} to {self.b}: {self.bandwidth_bytes_per_s} bytes/s, {self.latency_s} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of measurements on a host.

    Args:
        how: What was measured, for people.
    """

    host_id: str
    measured_unix_s: float
    how: str
    pairs: tuple[MeasuredPair, ...]
    version: int = field(default=_VERSION)

    @property
    def by_pair(self) -> Mapping[PairKey, MeasuredPair]:
        return {pair_key(each.a, each.b): each for each in self.pairs}


def state_file(environment: Mapping[str, str], *, home: Path) -> Path:
    """Return where measurements are kept.

    1. Under systemd: ``$STATE_DIRECTORY``.
    2. ``$XDG_STATE_HOME/flexpiped``.
    3. ``~/.local/state/flexpiped``.
    """
    if state := environment.get("STATE_DIRECTORY"):
        return Path(state.split(":")[0], FILE_NAME)
    if own := environment.get("XDG_STATE_HOME"):
        return Path(own, "flexpiped", FILE_NAME)
    return home / ".local" / "state" / "flexpiped" / FILE_NAME


def with_measured(host: HostTopology, measurement: Measurement | None) -> HostTopology:
    """Return the host with measured figures where there are some for two of its devices."""
    if measurement is None or measurement.host_id != host.host_id:
        return host
    ids = {device.id for device in host.devices}
    known = {pair: found for pair, found in measurement.by_pair.items() if ids.issuperset(pair) and pair[0] != pair[1]}
    links = dict(host.links) | {pair: _measured(host.link(*pair), found) for pair, found in known.items()}
    return replace(host, links=links)


def parse_measurement(text: str | bytes, *, file: str) -> Measurement:
    """Return the measurement that a file holds.

    Raises:
        NotMeasured: It cannot be used; the message names the place.
    """
    try:
        found = msgspec.json.decode(text, type=Measurement)
    except msgspec.MsgspecError as error:
        raise NotMeasured(f"{file}: {error}") from None
    if found.version != _VERSION:
        raise NotMeasured(f"{file}: version {found.version}; this flexpiped reads version {_VERSION}")
    return found


def load_measurement(path: Path) -> Measurement | None:
    """Return what was kept, or None if nothing was measured yet. Raises ``NotMeasured``."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotMeasured(f"{path}: {error.strerror}") from None
    return parse_measurement(text, file=str(path))


def save_measurement(path: Path, measurement: Measurement) -> None:
    """Keep a measurement; a reader finds the old file or the new one, never half. Raises ``NotMeasured``."""
    text = json.dumps(msgspec.to_builtins(measurement), indent=1) + "\n"
    try:
        replace_file(path, text)
    except OSError as error:
        raise NotMeasured(f"{path}: cannot be kept: {error.strerror}") from None


def merged(old: Measurement | None, new: Measurement) -> Measurement:
    """Return the new measurement with the pairs that only the old one has, if both are of the same host and kind."""
    if old is None or (old.host_id, old.how) != (new.host_id, new.how):
        return new
    pairs = dict(old.by_pair) | dict(new.by_pair)
    return replace(new, pairs=tuple(pairs.values()))


def _measured(link: Link, found: MeasuredPair) -> Link:
    return replace(link, bandwidth_bytes_per_s=found.bandwidth_bytes_per_s, latency_s=found.latency_s, is_measured=True)
