"""GPUs that appear, leave or get worse between two looks."""

from pathlib import Path

from tests.support.fake_nvml import discovered
from topology.changes import Change, changes
from topology.topology import HostTopology


def seen(sysfs: Path, **variables: object) -> HostTopology:
    return discovered(sysfs=sysfs, **variables)[0]  # type: ignore[arg-type]


def told(old: HostTopology, new: HostTopology) -> list[tuple[Change, str]]:
    return [(change.kind, change.sentence) for change in changes(old, new)]


def test_nothing_new_is_nothing_told(tmp_path: Path) -> None:
    assert told(seen(tmp_path, count=2), seen(tmp_path, count=2, held="0:7:100")) == []


def test_a_gpu_appears_and_leaves(tmp_path: Path) -> None:
    two, three = seen(tmp_path, count=2), seen(tmp_path, count=3)
    third = three.devices[2].id

    assert told(two, three) == [(Change.APPEARED, f"{third} appeared")]
    assert told(three, two) == [(Change.LEFT, f"{third} left: is not there any more")]


def test_a_gpu_is_lost(tmp_path: Path) -> None:
    (left, reason), (health, states) = told(seen(tmp_path, count=2), seen(tmp_path, count=2, lost=1))

    assert (left, health) == (Change.LEFT, Change.HEALTH)
    assert "fell off the bus" in reason
    assert "ok -> lost" in states


def test_the_driver_goes(tmp_path: Path) -> None:
    kinds = told(seen(tmp_path, count=1), seen(tmp_path, init=9))

    assert [kind for kind, _ in kinds] == [Change.LEFT, Change.DRIVER, Change.APPEARED, Change.APPEARED]
    assert kinds[1][1] == "driver no-driver: the NVIDIA kernel driver is not loaded"


def test_others_take_memory(tmp_path: Path) -> None:
    free, taken = seen(tmp_path, count=1), seen(tmp_path, count=1, held="0:7:4096")

    ((kind, sentence),) = told(free, taken)

    assert kind is Change.MEMORY
    assert sentence.endswith("others hold 4 GiB, 0 B before")
