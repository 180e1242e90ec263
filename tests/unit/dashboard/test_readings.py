"""Points of the plots and the topology as JSON values: a value that is missing says why."""

import sys
from pathlib import Path

from flexpiped.dashboard.readings import Series, point_of, topology_to_wire
from flexpiped.hardware import Hardware
from flexpiped.settings import DeviceSettings, DevicesKind, Settings
from planner.load import LoadMonitor


def test_what_is_missing_says_why() -> None:
    monitor = LoadMonitor(began_s=0.0, windows_s=(30.0, 180.0))
    point = point_of(monitor.observe(1.0), time_unix_s=100.0, tokens_per_s=None)

    assert (point.tokens_per_s, point.requests_per_s) == (None, 0.0)
    assert (point.ttft_s, point.tpot_s, point.kv_use) == ("not measured yet",) * 3
    assert point.cvs == ("too few requests to say",) * 2


def test_what_the_policy_sees_is_drawn() -> None:
    monitor = LoadMonitor(began_s=0.0, windows_s=(30.0,))
    for index in range(20):
        monitor.arrived(index, float(index))
        monitor.first_token(index, index + 0.5)
        monitor.ended(index, index + 0.9, output_tokens=5, tpot_s=0.1)
    seen = monitor.observe(20.0)
    point = point_of(seen, time_unix_s=100.0, tokens_per_s=7.0)

    assert (point.ttft_s, point.ttft_p99_s, point.tpot_s) == (seen.ttft_s, seen.ttft_p99_s, seen.tpot_s)
    assert (point.cvs, point.tokens_per_s) == ((0.0,), 7.0)


def test_only_the_last_points_are_kept() -> None:
    series, seen = Series(kept=2), LoadMonitor(began_s=0.0).observe(1.0)
    for time_unix_s in (1.0, 2.0, 3.0):
        series.add(point_of(seen, time_unix_s=time_unix_s, tokens_per_s=None))

    assert [point["time_unix_s"] for point in series.to_wire()] == [2.0, 3.0]


def looked(folder: Path, *, devices: int) -> dict[str, object]:
    settings = Settings(devices=DeviceSettings(kind=DevicesKind.CPU, cpu_count=devices))
    return topology_to_wire(Hardware(settings, python=sys.executable, state=folder / "links.json").look())


def test_the_topology_has_every_pair(tmp_path: Path) -> None:
    found = looked(tmp_path, devices=3)

    assert [(pair["a"], pair["b"], pair["name"]) for pair in found["pairs"]] == [  # type: ignore[attr-defined]
        ("cpu:0", "cpu:1", "SHM"),
        ("cpu:0", "cpu:2", "SHM"),
        ("cpu:1", "cpu:2", "SHM"),
    ]
    assert found["labels"] == {"cpu:0": "cpu:0", "cpu:1": "cpu:1", "cpu:2": "cpu:2"}


def test_of_very_many_devices_it_has_none(tmp_path: Path) -> None:
    assert looked(tmp_path, devices=65)["pairs"] == []
