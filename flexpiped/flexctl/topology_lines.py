"""``flexctl topology``: from a topology to lines for people, as ``nvidia-smi topo -m`` has them. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from flexpiped.flexctl.text import PLAIN, WIDTH, Colour, Paint, table, wrapped
from topology.cluster import ClusterTopology
from topology.device import DeviceKind
from topology.gpu import GpuRecord, MigMode
from topology.link import Link, LinkKind
from topology.states import DriverState, Health
from topology.topology import HostTopology, pairs
from topology.units import format_bytes, format_bytes_of, plural

_MOST_DEVICES_OF_A_MATRIX: Final = 64
_MEANINGS: Final = {
    LinkKind.NVLINK: "NVLink lanes from GPU to GPU",
    LinkKind.NVSWITCH: "NVLink lanes through NVSwitch",
    LinkKind.PIX: "at most one PCIe bridge",
    LinkKind.PXB: "several PCIe bridges, not the host bridge",
    LinkKind.PHB: "through a PCIe host bridge (the CPU)",
    LinkKind.NODE: "through host bridges of one NUMA node",
    LinkKind.SYS: "from one NUMA node to another",
    LinkKind.SHARED_MEMORY: "shared memory of the host",
    LinkKind.NETWORK: "network between hosts",
}
_SHORT: Final = {LinkKind.SHARED_MEMORY: "SHM", LinkKind.NETWORK: "NET"}


def topology_lines(
    topology: HostTopology | ClusterTopology, *, width: int = WIDTH, paint: Paint = PLAIN, source: str = ""
) -> list[str]:
    """Return headline, matrix, devices, what is odd, and the legend.

    Args:
        source: Where it is from, for the headline.
    """
    if isinstance(topology, ClusterTopology):
        return _cluster_lines(topology, width=width, source=source)
    lines = [_headline(topology, source)]
    if topology.title:
        lines.append(f"  {topology.title}")
    lines += _matrix_lines(topology, width)
    lines += ["", *_device_lines(topology)]
    lines += _oddities(topology, width, paint)
    lines += ["", *_legend(topology)]
    return lines


def labels_of(host: HostTopology) -> Mapping[str, str]:
    """Return a short name for each device of one host, for this output only.

    A GPU's is ``GPU`` and its number in the order of the bus, which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID; that
    of an instance adds ``M`` and its number on the GPU. CPU devices have their own id.
    """
    whole = sorted((gpu for gpu in host.gpus if not gpu.is_mig_instance), key=lambda gpu: gpu.pci_bus_id)
    labels = {gpu.uuid: f"GPU{number}" for number, gpu in enumerate(whole)}
    for parent in whole:
        instances = [gpu for gpu in host.gpus if gpu.parent_uuid == parent.uuid]
        labels |= {gpu.uuid: f"{labels[parent.uuid]}M{number}" for number, gpu in enumerate(instances)}
    unnamed = [device for device in host.devices if device.kind is DeviceKind.CUDA and device.id not in labels]
    labels |= {device.id: f"GPU{len(whole) + number}" for number, device in enumerate(unnamed)}
    prefix = f"{host.host_id}/"
    return labels | {each.id: each.id.removeprefix(prefix) for each in host.devices if each.kind is DeviceKind.CPU}


def link_name(link: Link) -> str:
    """Return the name of a link as ``nvidia-smi topo -m`` has it: ``NV18``, ``PIX``, ``SYS``."""
    return f"NV{link.lanes}" if link.is_nvlink else _SHORT.get(link.kind, link.kind.value.upper())


def rate(bytes_per_s: float) -> str:
    """Return GB/s with two or three digits: ``374``, ``27``, ``5.4``, ``0.31``."""
    value = bytes_per_s / 1e9
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"


def _headline(host: HostTopology, source: str) -> str:
    names = {device.name for device in host.devices}
    cpu = [device for device in host.devices if device.kind is DeviceKind.CPU]
    facts = [host.host_id or "this host"]
    if len(cpu) == len(host.devices):
        facts.append(plural(len(cpu), "CPU device") if cpu else "no devices")
    else:
        product = f" x {names.pop()}" if len(names) == 1 else " GPUs and instances"
        facts.append(f"{len(host.devices)}{product}")
    driver = host.driver
    if driver.driver_version:
        facts.append(f"driver {driver.driver_version}, CUDA {driver.cuda_version or 'not known'}")
    return "   ".join([*facts, source] if source else facts)


def _matrix_lines(host: HostTopology, width: int) -> list[str]:
    """Return the matrix in blocks of columns that fit; one line where every pair is alike and there are very many."""
    links = [link for _, _, link in pairs(host)]
    if not links:
        return []
    if len(host.devices) > _MOST_DEVICES_OF_A_MATRIX and len(set(links)) == 1:
        return ["", f"  every pair of the {len(host.devices)} devices: {_cell(links[0])} GB/s"]
    labels = labels_of(host)
    are_mixed = len({link.is_measured for link in links}) > 1
    cells = {
        row.id: [
            "-" if row is column else _cell(host.link(row.id, column.id), with_star=are_mixed)
            for column in host.devices
        ]
        for row in host.devices
    }
    first = max(len(labels[device.id]) for device in host.devices)
    wide = max(*(len(cell) for row in cells.values() for cell in row), first)
    at_once = max(1, (width - first - 1) // (wide + 1))
    lines: list[str] = []
    for start in range(0, len(host.devices), at_once):
        shown = range(start, min(start + at_once, len(host.devices)))
        lines += ["", " " * (first + 1) + _columns((labels[host.devices[index].id] for index in shown), wide)]
        lines += [
            f" {labels[row.id]:<{first}}" + _columns((cells[row.id][index] for index in shown), wide)
            for row in host.devices
        ]
    return [line.rstrip() for line in lines]


def _columns(cells: Iterable[str], wide: int) -> str:
    return "".join(" " + cell.ljust(wide) for cell in cells)


def _cell(link: Link, *, with_star: bool = False) -> str:
    return f"{link_name(link)} {rate(link.bandwidth_bytes_per_s)}" + ("*" if with_star and link.is_measured else "")


def _device_lines(host: HostTopology) -> list[str]:
    labels = labels_of(host)
    if all(device.kind is DeviceKind.CPU for device in host.devices):
        return _cpu_lines(host, labels)
    rows = [("device", "bus", "node", "memory free", "UUID")]
    rows += [
        (
            labels[device.id],
            device.pci_bus_id.removeprefix("0000:") or "-",
            "-" if device.numa_node is None else str(device.numa_node),
            format_bytes_of(device.memory_usable_bytes, device.memory_total_bytes),
            device.id.removeprefix(f"{host.host_id}/"),
        )
        for device in host.devices
    ]
    return table(rows, indent=" ", gap=" ")  # as narrow as it must be, for the UUID


def _cpu_lines(host: HostTopology, labels: Mapping[str, str]) -> list[str]:
    """Return a table, or one line for all devices that are alike."""
    alike = {(device.threads, device.memory_usable_bytes, device.memory_total_bytes) for device in host.devices}
    if len(alike) == 1 and len(host.devices) > 1:
        first, last = host.devices[0], host.devices[-1]
        threads = f"{plural(first.threads, 'thread')}, " if first.threads else ""
        free = format_bytes_of(first.memory_usable_bytes, first.memory_total_bytes)
        return [f"  {labels[first.id]} to {labels[last.id]}: {threads}{free} free each"]
    rows = [("device", "threads", "memory free")]
    rows += [
        (
            labels[device.id],
            str(device.threads or "-"),
            format_bytes_of(device.memory_usable_bytes, device.memory_total_bytes),
        )
        for device in host.devices
    ]
    return table(rows, gap="  ")


def _oddities(host: HostTopology, width: int, paint: Paint) -> list[str]:
    """Return what a user should know: the driver, GPUs that take no work, and what others hold."""
    labels, driver = labels_of(host), host.driver
    told: list[tuple[str, str, Colour | None]] = [("", text, None) for text in (*driver.unreadable, *driver.notes)]
    if driver.sentence:
        head = "no GPUs" if not host.gpus and driver.state is not DriverState.OLD_DRIVER else "driver"
        told.insert(0, (head, f": {driver.sentence}", None))
    for gpu in host.gpus:
        label = labels[gpu.uuid]
        if not gpu.health.is_usable:
            told.append((label, f" {gpu.pci_bus_id} {gpu.uuid}: {_unusable(gpu.health)}", Colour.RED))
        elif gpu.health.sentence:
            told.append((label, f": {gpu.health.sentence}", Colour.YELLOW))
        if gpu.mig_mode is MigMode.ENABLED:
            told.append((label, " is divided into MIG instances: work goes to them", None))
        if gpu.memory_others_bytes:
            told.append((label, f": others hold {format_bytes(gpu.memory_others_bytes)}{_holders(gpu)}", None))
    lines = [""] if told else []
    for label, text, colour in told:
        first, *rest = wrapped(label + text, head="  ", width=width - 2)
        lines.append("  " + (paint(label, colour) if colour else label) + first.removeprefix("  " + label))
        lines += ["  " + line for line in rest]
    return lines


def _unusable(health: Health) -> str:
    """Return the state and its reason, which may begin with the same word."""
    state = health.state.value
    return health.sentence if health.sentence.startswith(state) else f"{state}, {health.sentence}"


def _holders(gpu: GpuRecord) -> str:
    if not gpu.processes:
        return " (processes that this user or container may not see)"
    named = [
        f"{each.name or 'a process'} (pid {each.pid}"
        + ("" if each.used_bytes is None else f", {format_bytes(each.used_bytes)}")
        + ")"
        for each in gpu.processes
    ]
    return ": " + ", ".join(named)


def _legend(topology: HostTopology) -> list[str]:
    links = [link for _, _, link in pairs(topology)]
    lines = [f"  GB/s one way{_origin(links)}"] if links else []
    for kind in LinkKind:
        these = [link for link in links if link.kind is kind]
        if these:
            names = sorted({link_name(link) for link in these})
            lines.append(f"  {'/'.join(names):<5} {_MEANINGS[kind]}{_detail(these)}")
    if any(device.kind is DeviceKind.CUDA for device in topology.devices):
        lines.append("  GPU numbers: this table's and, with CUDA_DEVICE_ORDER=PCI_BUS_ID, CUDA's")
    return lines


def _origin(links: Sequence[Link]) -> str:
    measured = sum(link.is_measured for link in links)
    if measured == len(links):
        return ", measured on these devices"
    return "; * measured, else as published rates give it" if measured else ", as published rates give it"


def _detail(links: Sequence[Link]) -> str:
    """Return the latency, the wires and P2P of links of a kind."""
    latencies = sorted(link.latency_s * 1e6 for link in links)
    low, high = f"{latencies[0]:.3g}", f"{latencies[-1]:.3g}"
    parts = [f"{low} us" if low == high else f"{low} to {high} us"]
    wires = {(link.generation, link.width) for link in links if link.width}
    if len(wires) == 1:
        generation, width = wires.pop()
        parts.append(f"{generation}.0 x{width}")
    if refused := sum(link.p2p.is_refused for link in links):
        parts.append("no P2P" if refused == len(links) else f"no P2P on {refused} of {len(links)}")
    return f"; {', '.join(parts)}"


def _cluster_lines(cluster: ClusterTopology, *, width: int, source: str) -> list[str]:
    """Return the hosts in a table, then each host that differs from those before, and the network."""
    racks = {host.rack for host in cluster.hosts}
    facts = [f"{plural(len(cluster.hosts), 'host')} in {plural(len(racks), 'rack')}"]
    facts += [plural(len(cluster.devices), "device")] + ([source] if source else [])
    rows = [("host", "rack", "devices", "memory free", "of which shared")]
    rows += [
        (
            host.host_id,
            host.rack or "-",
            _devices_in_words(host),
            format_bytes_of(
                sum(device.memory_usable_bytes for device in host.devices),
                sum(device.memory_total_bytes for device in host.devices),
            ),
            str(sum(device.is_shared for device in host.devices)),
        )
        for host in cluster.hosts
    ]
    network = cluster.network
    lines = ["   ".join(facts), "", *table(rows, gap="  "), ""]
    lines.append(f"  within a rack {_network(network.within_rack)}; between racks {_network(network.between_racks)}")
    shown: list[tuple[object, ...]] = []
    for host in cluster.hosts:
        pattern = (len(host.devices), *(link for _, _, link in pairs(host)))
        if pattern in shown or len(host.devices) < 2:
            continue
        shown.append(pattern)
        lines += ["", f"links of {host.host_id}, and of hosts like it", *_matrix_lines(host, width)]
    return lines


def _devices_in_words(host: HostTopology) -> str:
    counts: dict[str, int] = {}
    for device in host.devices:
        name = device.name.removeprefix("NVIDIA ") or device.kind.value
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{count} x {name}" for name, count in counts.items()) or "none"


def _network(link: Link) -> str:
    return f"{rate(link.bandwidth_bytes_per_s)} GB/s, {link.latency_s * 1e6:.3g} us"
