"""Measured figures: kept, read back, and put in place of published ones."""

from pathlib import Path

import pytest

from topology.device import cpu_devices
from topology.errors import NotMeasured
from topology.link import LinkKind
from topology.measured import (
    MeasuredPair,
    Measurement,
    load_measurement,
    merged,
    parse_measurement,
    save_measurement,
    state_file,
    with_measured,
)
from topology.topology import HostTopology

HOST = HostTopology(host_id="h", devices=cpu_devices(count=3, memory_bytes=1))


def measurement(*pairs: tuple[str, str], rate: float = 7e9, host_id: str = "h") -> Measurement:
    return Measurement(
        host_id=host_id,
        measured_unix_s=1.5,
        how="shared memory",
        pairs=tuple(MeasuredPair(a=a, b=b, bandwidth_bytes_per_s=rate, latency_s=2e-5) for a, b in pairs),
    )


def test_measured_figures_take_the_place_of_published_ones() -> None:
    host = with_measured(HOST, measurement(("cpu:1", "cpu:0"), ("cpu:0", "cpu:9"), ("cpu:1", "cpu:1")))

    link = host.link("cpu:0", "cpu:1")

    assert (link.kind, link.bandwidth_bytes_per_s, link.latency_s) == (LinkKind.SHARED_MEMORY, 7e9, 2e-5)
    assert link.is_measured
    assert not host.link("cpu:0", "cpu:2").is_measured
    assert len(host.links) == 1


def test_what_another_host_measured_does_not_count() -> None:
    assert with_measured(HOST, measurement(("cpu:0", "cpu:1"), host_id="other")) is HOST
    assert with_measured(HOST, None) is HOST


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "state" / "links.json"
    found = measurement(("cpu:0", "cpu:1"))

    assert load_measurement(path) is None
    save_measurement(path, found)

    assert load_measurement(path) == found
    assert [each.name for each in path.parent.iterdir()] == ["links.json"]


def test_a_later_run_keeps_pairs_that_it_did_not_measure() -> None:
    old, new = measurement(("a", "b"), ("a", "c"), rate=1), measurement(("b", "a"), rate=2)

    assert {pair: each.bandwidth_bytes_per_s for pair, each in merged(old, new).by_pair.items()} == {
        ("a", "b"): 2,
        ("a", "c"): 1,
    }
    assert merged(measurement(("a", "b"), host_id="other"), new) is new
    assert merged(None, new) is new


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "truncated"),
        ('{"host_id": 3}', r"\$\.host_id"),
        ('{"host_id":"h","measured_unix_s":1,"how":"x","version":2,"pairs":[]}', "version 2"),
        (
            '{"host_id":"h","measured_unix_s":1,"how":"x",'
            '"pairs":[{"a":"x","b":"y","bandwidth_bytes_per_s":0,"latency_s":0}]}',
            r"\$\.pairs\[0\]",
        ),
    ],
)
def test_what_cannot_be_used_is_named(text: str, reason: str) -> None:
    with pytest.raises(NotMeasured, match=rf"links\.json: .*{reason}"):
        parse_measurement(text, file="links.json")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(NotMeasured, match=r"file/links\.json: cannot be kept"):
        save_measurement(tmp_path / "file" / "links.json", measurement())
    with pytest.raises(NotMeasured, match=r"Is a directory"):
        load_measurement(tmp_path)


@pytest.mark.parametrize(
    ("environment", "path"),
    [
        ({"STATE_DIRECTORY": "/var/lib/flexpiped:/x", "XDG_STATE_HOME": "/s"}, "/var/lib/flexpiped/links.json"),
        ({"XDG_STATE_HOME": "/s"}, "/s/flexpiped/links.json"),
        ({}, "/home/me/.local/state/flexpiped/links.json"),
    ],
)
def test_where_it_is_kept(environment: dict[str, str], path: str) -> None:
    assert state_file(environment, home=Path("/home/me")) == Path(path)
