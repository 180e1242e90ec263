"""From a topology and the layout in force to the places that may carry a stage, and the hops between them."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from planner.holdings import Holding, holdings, kv_bytes, weight_bytes
from planner.layout import Pipeline
from planner.placement_problem import Charge, Hops, Place
from planner.question import PlanQuestion
from planner.stage_times import DeviceGroups, speed_key
from topology.cluster import ClusterTopology
from topology.device import Device, DeviceKind
from topology.link import Link
from topology.topology import HostTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """Devices of one host that NVLink joins, or CPU devices that share its memory: a group stays within one."""

    name: str
    host_id: str
    rack: str
    devices: tuple[Device, ...]


def islands(topology: HostTopology | ClusterTopology) -> tuple[Island, ...]:
    """Return the islands in the order of the devices. A GPU without NVLink is one by itself."""
    hosts = topology.hosts if isinstance(topology, ClusterTopology) else (topology,)
    return tuple(island for host in hosts for island in _islands_of(host))


def _islands_of(host: HostTopology) -> Iterator[Island]:
    left = list(host.devices)
    while left:
        first = left.pop(0)
        together, reached = [first], [first]
        while reached:
            here = reached.pop()
            joined = [other for other in left if _are_joined(here, other, host)]
            left = [other for other in left if other not in joined]
            together += joined
            reached += joined
        together.sort(key=host.devices.index)
        yield Island(name=f"{host.host_id}:{first.id}", host_id=host.host_id, rack=host.rack, devices=tuple(together))


def _are_joined(a: Device, b: Device, host: HostTopology) -> bool:
    if a.kind is not b.kind:
        return False
    return a.kind is DeviceKind.CPU or host.link(a.id, b.id).is_nvlink


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of the layout in force: on each device in all, and by piece where a group has it whole."""

    on_device: Mapping[str, int]
    on_group: Mapping[tuple[str, ...], Mapping[int, int]]


def held_now(question: PlanQuestion, bounds: Sequence[int]) -> Held:
    """Return what the layout in force holds. ``bounds``: the first decoder of each piece, and the end."""
    if question.current is None:
        return Held(on_device={}, on_group={})
    graph, slots = question.graph, question.engine.kv_tokens or 0
    there = holdings(question.current, graph)
    budget = question.engine.kv_device_bytes
    on_device = {device: _bytes_of(held, question, slots) + budget for device, held in there.items()}
    shared = _by_piece(question, question.current, bounds, slots) if question.shares_current else {}
    return Held(on_device=on_device, on_group=shared)


def _bytes_of(held: Sequence[Holding], question: PlanQuestion, slots: int) -> int:
    return weight_bytes(held, question.graph) + kv_bytes(held, slots=slots)


def _by_piece(
    question: PlanQuestion, current: Pipeline, bounds: Sequence[int], slots: int
) -> dict[tuple[str, ...], dict[int, int]]:
    graph, found = question.graph, {}
    last_piece = len(bounds) - 2
    for index, stage in enumerate(current.stages):
        pieces: dict[int, int] = {}
        for piece in range(last_piece + 1):
            first, end = bounds[piece], bounds[piece + 1]
            if not stage.first_decoder <= first < end <= stage.end_decoder:
                continue
            layers = list(graph.decoders[first:end])
            layers += [graph.embedding] if piece == 0 else []
            layers += [graph.head] if piece == last_piece else []
            kv = sum(layer.kv_bytes_per_token for layer in layers) * slots
            pieces[piece] = graph.placed_bytes(layers) + kv
        found[current.stages[index].device_ids] = pieces
    return found


class Places:
    """The places for stages of one tensor-parallel degree, with the speed classes and hops that belong to them."""

    def __init__(
        self, question: PlanQuestion, *, num_stages: int, degree: int, bounds: Sequence[int], fixed_bytes: int
    ) -> None:
        self._question = question
        self._groups = DeviceGroups(question, num_stages=num_stages)
        self._held = held_now(question, bounds)
        self._fixed_bytes = fixed_bytes
        self._by_id = {device.id: device for device in question.topology.devices}
        self._islands = {device.id: island for island in islands(question.topology) for device in island.devices}
        self.classes: dict[tuple[object, ...], tuple[str, ...]] = {}  # a group of each speed class
        if question.engine.resident:
            groups: Iterable[tuple[str, ...]] = question.engine.resident
        else:
            groups = self._candidates(degree)
        self.places = tuple(self._place(group) for group in groups)

    def _candidates(self, degree: int) -> Iterator[tuple[str, ...]]:
        """Yield device groups of one size, each within an island; those of the layout in force are among them."""
        seen: set[tuple[str, ...]] = set()
        for island in dict.fromkeys(self._islands.values()):
            for group in self._groups_of(island, degree):
                seen.add(group)
                yield group
        current = self._question.current
        for stage in () if current is None else current.stages:
            is_here = self._by_id.keys() >= set(stage.device_ids)
            if is_here and len(stage.device_ids) == degree and stage.device_ids not in seen:
                yield stage.device_ids

    def _groups_of(self, island: Island, degree: int) -> Iterator[tuple[str, ...]]:
        """Yield the groups of ``degree`` devices of an island.

        A group has as much memory as its fullest device allows, and the speed of its slowest, so devices that are alike
        belong together: neighbours in the order of speed and free memory. Of devices that differ in nothing it does not
        matter which are together, so each is in one group only.
        """
        keys = {device.id: (str(speed_key(device)), -self._free_bytes(device.id)) for device in island.devices}
        ordered = sorted(keys, key=lambda device_id: keys[device_id])
        if degree == 1:
            ordered = list(keys)
        step = degree if len(set(keys.values())) == 1 else 1
        for start in range(0, len(ordered) - degree + 1, step):
            yield tuple(ordered[start : start + degree])

    def _place(self, group: tuple[str, ...]) -> Place:
        island = self._islands[group[0]]
        free = [self._free_bytes(device) for device in group]
        key = (len(group), *sorted({speed_key(device) for device in self._groups.of(group)}, key=str))
        self.classes.setdefault(key, group)
        return Place(
            name="+".join(group),
            device_ids=group,
            speed_class=list(self.classes).index(key),
            free_bytes=len(group) * min(free),
            fixed_bytes=len(group) * (self._fixed_bytes + self._reserved_to_add(group)),
            host=island.host_id,
            rack=island.rack,
            island=island.name,
            held=self._held.on_group.get(group, {}),
            arrival_bytes_per_s=self._arrival_bytes_per_s(group),
        )

    def _reserved_to_add(self, group: tuple[str, ...]) -> int:
        """Return what each device of a group has whatever its layers are, unless the layout in force has it there.

        That is a budget for KV cache, and its share of what the engine has on every stage.
        """
        if group in self._held.on_group:
            return 0
        return self._question.engine.kv_device_bytes + -(-self._question.graph.copied_bytes // len(group))

    def _free_bytes(self, device_id: str) -> int:
        device = self._by_id[device_id]
        usable = int(device.memory_usable_bytes * (1 - self._question.headroom))
        return usable - self._held.on_device.get(device_id, 0)

    def _arrival_bytes_per_s(self, group: tuple[str, ...]) -> int:
        """Return the rate of the slowest link from the devices that hold layers now: pieces may come from any."""
        here = [device for device in self._held.on_device if device in self._by_id]  # others are gone
        sources = [device for device in here if device not in group]
        links = [self._question.topology.link(source, group[0]) for source in sources]
        rates = [link.bandwidth_bytes_per_s for link in links] or [1e9]
        return max(1, int(min(rates)))

    # --- hops ---

    def hops(self, *, tokens: float) -> Hops:
        """Return what the activations of ``tokens`` take between any two places."""
        by_host: dict[str, list[Place]] = defaultdict(list)
        racks: dict[str, str] = {}
        for place in self.places:
            by_host[place.host].append(place)
            racks.setdefault(place.host, place.rack)
        same_host: dict[str, int] = {}
        pairs: dict[tuple[str, str], int] = {}
        for host, here in by_host.items():
            links = {
                (a.name, b.name): self._hop_ns(self._question.topology.link(a.device_ids[0], b.device_ids[0]), tokens)
                for a, b in permutations(here, 2)
                if a.device_ids[0] != b.device_ids[0]
            }
            if len(set(links.values())) == 1:
                same_host[host] = next(iter(links.values()))
            else:
                pairs |= links
        return self._with_network(same_host, pairs, tokens)

    def _with_network(self, same_host: dict[str, int], pairs: dict[tuple[str, str], int], tokens: float) -> Hops:
        topology = self._question.topology
        if not isinstance(topology, ClusterTopology):
            return Hops(network_ns=0, same_host_ns=same_host, pairs=pairs)
        network = topology.network
        by_host: dict[str, list[Place]] = defaultdict(list)
        for place in self.places:
            by_host[place.host].append(place)
        for (a, b), link in network.links.items():  # hosts with a link of their own
            ns = self._hop_ns(link, tokens)
            pairs |= {(x.name, y.name): ns for x in by_host[a] for y in by_host[b]}
            pairs |= {(y.name, x.name): ns for x in by_host[a] for y in by_host[b]}
        within = self._hop_ns(network.within_rack, tokens)
        return Hops(
            network_ns=self._hop_ns(network.between_racks, tokens),
            same_host_ns=same_host,
            same_rack_ns={host.rack: within for host in topology.hosts},
            pairs=pairs,
        )

    def _hop_ns(self, link: Link, tokens: float) -> int:
        size = self._question.graph.embedding.activation_bytes_per_token * tokens
        return round(link.seconds_for(size) * 1e9)

    # --- fragmentation ---

    def charges(self) -> tuple[Charge, ...]:
        """Return the points for touching devices: whole ones, islands, what others use, paths with recent scaling."""
        points, ours = self._question.fragmentation, set(self._held.on_device)
        cv = self._question.workload.cv
        shared = round(points.shared * (1 + points.shared_per_cv2 * cv**2))
        found: list[Charge] = []
        for island in dict.fromkeys(self._islands.values()):
            untouched = [d for d in island.devices if not d.is_shared and d.id not in ours]
            found += [Charge(device_ids=frozenset({d.id}), points=points.whole_device) for d in untouched]
            found += [Charge(device_ids=frozenset({d.id}), points=shared) for d in island.devices if d.is_shared]
            if len(untouched) == len(island.devices) > 1 and island.devices[0].kind is DeviceKind.CUDA:
                ids = frozenset(device.id for device in island.devices)
                found.append(Charge(device_ids=ids, points=points.whole_island))
        return (*found, *self._marked_paths(ours))

    def _marked_paths(self, ours: Container[str]) -> Iterator[Charge]:
        """Yield the points for loading over paths on which others have just scaled; what is ours is loaded."""
        for device, heat in self._question.scaling.items():
            points = round(self._question.fragmentation.scaled_path * heat)
            if device in self._by_id and device not in ours and points:
                yield Charge(device_ids=frozenset({device}), points=points)
