"""How long it takes to know the hardware: discovery, snapshots, clusters, links. No engine, a minute at most.

GPUs are those of a stand-in for NVML (``tests/support/fake_nvml.c``), so the figures are our own part of the time,
without the driver's.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.bench.stats import median
from tests.bench.tables import Bound, ms, table, verdicts, write_json
from tests.support.fake_nvml import discovered
from tests.support.pci_tree import make_pci_tree
from topology.cluster import ClusterTopology, Network, merge
from topology.link_figures import network_link
from topology.machines import as_host, load_topology
from topology.resource_graph import ResourceGraph
from topology.snapshot import from_json, to_json
from topology.topology import HostTopology

_NETWORK = Network(within_rack=network_link(bits_per_s=100e9))


def main() -> None:
    options = _options()
    repeat = 2 if options.short else 20
    sixteen_s = _sixteen_gpus(repeat)
    paper = _paper_hosts()
    texts = [to_json(host) for host in paper]
    cluster = merge(paper, network=_NETWORK)
    ids = [device.id for device in cluster.devices]
    graph = ResourceGraph(cluster=cluster)
    many = _many_hosts()
    times = {
        "discover 16 GPUs, 120 pairs": sixteen_s,
        "merge 42 hosts, 82 GPUs": _median_s(lambda: merge(paper, network=_NETWORK), repeat),
        "read and merge 42 snapshots, ask all 6,724 links": _median_s(lambda: _read_merge_ask(texts), repeat),
        "replace one of the 42 hosts": _median_s(lambda: cluster.with_host(replace(paper[7], title="new")), repeat),
        "mark a scaling of 8 devices, order 82 by marks": _median_s(
            lambda: graph.scaled(ids[:8], now_s=0).coolest(ids, now_s=1), repeat
        ),
        "merge 1,213 hosts, 6,212 GPUs": _median_s(lambda: merge(many, network=_NETWORK), max(2, repeat // 4)),
    }
    limits = {"discover 16 GPUs, 120 pairs": 0.2, "read and merge 42 snapshots, ask all 6,724 links": 0.5}
    rows = [[name, ms(seconds)] for name, seconds in times.items()]
    table("topology: medians, of discovery the best run", ["what", "ms"], rows)
    bounds = [
        Bound(what=name, value=times[name], limit=limit, at_most=True, unit="s") for name, limit in limits.items()
    ]
    verdicts(bounds)
    write_json(options.json, {"seconds": times}, bounds)


def _options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="few repetitions: proves the program, gives no figures")
    made.add_argument("--json", metavar="FILE", type=Path, help="write the raw figures here")
    return made.parse_args()


def _median_s(work: Callable[[], object], repeat: int) -> float:
    times: list[float] = []
    for _ in range(repeat):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return median(times)


def _sixteen_gpus(repeat: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        paths = {f"pci0000:00/0000:00:{index:02x}.0/0000:{0x10 + index:02x}:00.0": index // 8 for index in range(16)}
        _, seconds = discovered(sysfs=make_pci_tree(Path(folder), paths), count=16, wires="nvswitch", repeat=repeat)
    return seconds


def _machine(name: str) -> HostTopology:
    found = load_topology(name)
    assert isinstance(found, HostTopology)
    return found


def _paper_hosts() -> list[HostTopology]:
    """Return FlexPipe's testbed: 42 hosts with 82 GPUs, two of them with one."""
    pair = _machine("2xa10-workstation")
    hosts = [as_host(pair, f"host{index}", rack=f"rack{index // 6}") for index in range(42)]
    return [
        replace(host, devices=host.devices[:1], links={}, gpus=host.gpus[:1]) if index >= 40 else host
        for index, host in enumerate(hosts)
    ]


def _many_hosts() -> list[HostTopology]:
    """Return as many hosts and GPUs as the openb cluster has."""
    eight, pair = _machine("8xl40s-pcie"), _machine("2xa10-workstation")
    eights = 631  # 631 * 8 + 582 * 2 = 6,212
    return [as_host(eight if index < eights else pair, f"n{index}", rack=f"r{index // 40}") for index in range(1213)]


def _read_merge_ask(texts: list[str]) -> ClusterTopology:
    hosts = [from_json(text) for text in texts]
    cluster = merge([host for host in hosts if isinstance(host, HostTopology)], network=_NETWORK)
    for a in cluster.devices:
        for b in cluster.devices:
            cluster.link(a.id, b.id)
    return cluster


if __name__ == "__main__":
    main()
