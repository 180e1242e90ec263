"""The PCIe tree as sysfs shows it: which way two functions reach each other, and how wide and fast it is.

A function's real path in sysfs names every bridge above it, for example
``devices/pci0000:00/0000:00:01.0/0000:01:00.0/0000:02:04.0/0000:03:00.0``: host bridge, root port, the upstream and a
downstream port of a switch, and the GPU.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Final

from topology.link import LinkKind

SYSFS: Final = Path("/sys")
_FUNCTION: Final = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")
_HOST_BRIDGE: Final = re.compile(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}$")
# GT/s as sysfs writes them, by generation
_GENERATIONS: Final = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


def normal_bus_id(text: str) -> str:
    """Return a PCI bus id as sysfs writes it: ``00000000:3B:00.0`` (NVML) becomes ``0000:3b:00.0``."""
    domain, _, rest = text.strip().lower().partition(":")
    return f"{domain[-4:] if set(domain[:-4]) <= {'0'} else domain}:{rest}" if rest else text.strip().lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class PciePath:
    """The way between two functions. Zero: sysfs does not say."""

    kind: LinkKind
    generation: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Port:
    name: str
    generation: int
    width: int


class PciTree:
    """Reads the tree once per function. Whatever is missing or unreadable is unknown, never an error.

    Args:
        root: Where sysfs is mounted.
    """

    def __init__(self, root: Path = SYSFS) -> None:
        self._root = root
        self._ports: dict[str, _Port] = {}
        self._chains: dict[str, tuple[str, ...]] = {}
        self._nodes: dict[str, int | None] = {}

    def knows(self, bus_id: str) -> bool:
        return bool(self._chain(bus_id))

    def numa_node(self, bus_id: str) -> int | None:
        """Return the NUMA node that a function is at, None if the firmware does not say."""
        if bus_id not in self._nodes:
            text = _read(self._root / "bus/pci/devices" / bus_id / "numa_node")
            self._nodes[bus_id] = int(text) if text.isdecimal() else None  # -1: not said
        return self._nodes[bus_id]

    def path(self, a: str, b: str) -> PciePath | None:
        """Return the way between two functions, or None if either is not in the tree."""
        up, down = self._chain(a), self._chain(b)
        if not up or not down:
            return None
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(up, down, strict=False))))
        way = [self._port(name) for name in (*up[max(shared, 1) :], *down[max(shared, 1) :])]
        return PciePath(
            kind=self._kind(a, b, shared, len(up), len(down)),
            generation=min((port.generation for port in way if port.generation), default=0),
            width=min((port.width for port in way if port.width), default=0),
        )

    def _kind(self, a: str, b: str, shared: int, up: int, down: int) -> LinkKind:
        """Classify as ``nvidia-smi topo -m`` does.

        1. A bridge in common (PIX if each is below one more port of it at most, else PXB).
        2. Only the host bridge in common: PHB.
        3. Host bridges of one NUMA node: NODE. A host with one node only is one, whatever its firmware says.
        4. Else SYS.
        """
        if shared > 1:
            return LinkKind.PIX if max(up, down) - shared <= 2 else LinkKind.PXB
        if shared == 1:
            return LinkKind.PHB
        nodes = {self.numa_node(a), self.numa_node(b)}
        same = len(nodes) == 1 and None not in nodes
        return LinkKind.NODE if same or self._node_count <= 1 else LinkKind.SYS

    @cached_property
    def _node_count(self) -> int:
        return len(list((self._root / "devices/system/node").glob("node[0-9]*")))

    def _chain(self, bus_id: str) -> tuple[str, ...]:
        """Return host bridge, bridges and function, from the top; empty if sysfs does not have it."""
        if bus_id not in self._chains:
            link = self._root / "bus/pci/devices" / bus_id
            parts = link.resolve().parts if link.exists() else ()
            self._chains[bus_id] = tuple(part for part in parts if _HOST_BRIDGE.match(part) or _FUNCTION.match(part))
        return self._chains[bus_id]

    def _port(self, name: str) -> _Port:
        if name not in self._ports:
            folder = self._root / "bus/pci/devices" / name
            speed = _read(folder / "max_link_speed").partition(" ")[0]  # an idle link runs slower than it can
            self._ports[name] = _Port(name=name, generation=_GENERATIONS.get(speed, 0), width=self._width(folder))
        return self._ports[name]

    def _width(self, folder: Path) -> int:
        """Return the lanes in use: a wide card in a narrow slot never gets more."""
        texts = (_read(folder / "current_link_width"), _read(folder / "max_link_width"))
        widths = (int(text) for text in texts if text.isdecimal())
        return next((width for width in widths if 0 < width <= 32), 0)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # not there, or not for us
        return ""
