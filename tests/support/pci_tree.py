"""Makes PCIe trees as sysfs shows them."""

from pathlib import Path


def make_pci_tree(root: Path, paths: dict[str, int], *, speeds: dict[str, tuple[str, int]] | None = None) -> Path:
    """Write a tree below ``root`` and return it.

    Args:
        paths: Path of each function below ``devices``, as ``pci0000:00/0000:00:01.0/0000:10:00.0``, with its NUMA node.
        speeds: By function, what its link says: GT/s and lanes. Others: 32.0 and 16.
    """
    folder = root / "bus/pci/devices"
    folder.mkdir(parents=True, exist_ok=True)
    for path, node in paths.items():
        real = root / "devices"
        for name in path.split("/"):
            real = real / name
            real.mkdir(parents=True, exist_ok=True)
            if name.startswith("pci"):
                continue
            speed, width = (speeds or {}).get(name, ("32.0", 16))
            (real / "max_link_speed").write_text(f"{speed} GT/s PCIe\n")
            (real / "current_link_speed").write_text("2.5 GT/s PCIe\n")
            (real / "max_link_width").write_text("16\n")
            (real / "current_link_width").write_text(f"{width}\n")
            (real / "numa_node").write_text(f"{node}\n")
            link = folder / name
            if not link.exists():
                link.symlink_to(Path("../../../devices") / real.relative_to(root / "devices"))
    for node in {node for node in paths.values() if node >= 0}:
        (root / f"devices/system/node/node{node}").mkdir(parents=True, exist_ok=True)
    return root
