"""PCIe trees as sysfs shows them: the class of every path, its generation and width."""

from pathlib import Path

import pytest

from tests.support.pci_tree import make_pci_tree
from topology.link import LinkKind
from topology.pcie import PciTree, normal_bus_id

SWITCH = "pci0000:00/0000:00:01.0/0000:01:00.0"  # host bridge, root port, upstream port
TREE = {
    f"{SWITCH}/0000:02:00.0/0000:03:00.0": 0,
    f"{SWITCH}/0000:02:01.0/0000:04:00.0": 0,
    f"{SWITCH}/0000:02:02.0/0000:05:00.0/0000:06:00.0/0000:07:00.0": 0,  # a switch below the switch
    "pci0000:00/0000:00:02.0/0000:08:00.0": 0,  # another root port
    "pci0000:40/0000:40:01.0/0000:41:00.0": 0,  # another host bridge, same NUMA node
    "pci0000:80/0000:80:01.0/0000:81:00.0": 1,  # the other socket
}


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ("0000:03:00.0", "0000:04:00.0", LinkKind.PIX),
        ("0000:03:00.0", "0000:07:00.0", LinkKind.PXB),
        ("0000:03:00.0", "0000:08:00.0", LinkKind.PHB),
        ("0000:03:00.0", "0000:41:00.0", LinkKind.NODE),
        ("0000:03:00.0", "0000:81:00.0", LinkKind.SYS),
    ],
)
def test_paths_are_classified_as_nvidia_smi_does(tmp_path: Path, a: str, b: str, kind: LinkKind) -> None:
    tree = PciTree(make_pci_tree(tmp_path, TREE))

    there, back = tree.path(a, b), tree.path(b, a)

    assert there is not None
    assert there.kind is kind
    assert there == back


def test_the_slowest_and_narrowest_part_of_the_way_counts(tmp_path: Path) -> None:
    speeds = {"0000:02:00.0": ("16.0", 16), "0000:41:00.0": ("32.0", 8), "0000:00:01.0": ("8.0", 4)}
    tree = PciTree(make_pci_tree(tmp_path, TREE, speeds=speeds))

    below = tree.path("0000:03:00.0", "0000:04:00.0")
    above = tree.path("0000:03:00.0", "0000:41:00.0")

    assert below is not None  # the link above the switch is not on its way
    assert (below.generation, below.width) == (4, 16)
    assert above is not None
    assert (above.generation, above.width) == (3, 4)


def test_firmware_that_names_no_node(tmp_path: Path) -> None:
    one_socket = dict.fromkeys(TREE, -1)
    tree = PciTree(make_pci_tree(tmp_path, one_socket))

    path = tree.path("0000:03:00.0", "0000:81:00.0")

    assert tree.numa_node("0000:03:00.0") is None
    assert path is not None
    assert path.kind is LinkKind.NODE


def test_what_is_not_there_is_unknown(tmp_path: Path) -> None:
    tree = PciTree(make_pci_tree(tmp_path, TREE))

    assert tree.path("0000:03:00.0", "0000:99:00.0") is None
    assert PciTree(tmp_path / "nowhere").path("0000:03:00.0", "0000:04:00.0") is None
    assert PciTree(tmp_path / "nowhere").numa_node("0000:03:00.0") is None
    assert tree.knows("0000:03:00.0")


def test_a_tree_without_speeds_gives_none(tmp_path: Path) -> None:
    root = make_pci_tree(tmp_path, TREE)
    for name in ("max_link_speed", "max_link_width", "current_link_width"):
        for file in (root / "devices").rglob(name):
            file.unlink()

    path = PciTree(root).path("0000:03:00.0", "0000:04:00.0")

    assert path is not None
    assert (path.kind, path.generation, path.width) == (LinkKind.PIX, 0, 0)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("00000000:3B:00.0", "0000:3b:00.0"),
        ("0000:3b:00.0", "0000:3b:00.0"),
        ("00010000:3B:00.0", "00010000:3b:00.0"),
        ("nonsense", "nonsense"),
    ],
)
def test_bus_ids_are_written_one_way(given: str, normal: str) -> None:
    assert normal_bus_id(given) == normal
