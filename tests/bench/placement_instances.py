"""Placement problems of the size of real clusters: the models, the partly used hosts, the links."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from planner.placement_problem import Charge, Hops, Piece, Place, PlacementProblem
from tests.bench.openb import CARDS, Node
from topology.units import GIB

NETWORK_NS = 2_100_000  # a hop over the network, as FlexPipe measured it
HOST_NS = 300_000
MIN_KV_TOKENS = 65_536  # 32 requests of 2,048 tokens
FIXED_BYTES = GIB  # activations, workspace and headroom
_SHARED_POINTS = 3  # gamma0 (1 + alpha CV^2) of Eq 9 in points, for a device with other tenants
_WHOLE_POINTS = 10
_HOST_CARDS = ("G3", "V100M32", "A10", "T4")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A model as far as placing it goes: bytes of a layer, of the ends, of a token's KV cache in a layer."""

    name: str
    layers: int
    layer_bytes: int
    first_bytes: int
    last_bytes: int
    kv_bytes: int

    def pieces(self, seed: int | None = None) -> tuple[Piece, ...]:
        """Return a piece for each layer; with a seed the layers are uneven, up to a quarter more or less."""
        rng = random.Random(seed)
        sizes = [
            int(self.layer_bytes * (rng.uniform(0.75, 1.25) if seed is not None else 1)) for _ in range(self.layers)
        ]
        sizes[0] += self.first_bytes
        sizes[-1] += self.last_bytes
        return tuple(Piece(weight_bytes=size, kv_bytes_per_token=self.kv_bytes) for size in sizes)


# from the published configurations, two bytes a parameter
OPT_66B = ModelShape(
    name="OPT-66B",
    layers=64,
    layer_bytes=12 * 9216**2 * 2,
    first_bytes=(50272 + 2050) * 9216 * 2,
    last_bytes=0,
    kv_bytes=2 * 9216 * 2,
)
LLAMA_70B = ModelShape(
    name="Llama-3-70B",
    layers=80,
    layer_bytes=(2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) * 2,
    first_bytes=128256 * 8192 * 2,
    last_bytes=128256 * 8192 * 2,
    kv_bytes=2 * 1024 * 2,
)


def class_times(pieces: Sequence[Piece]) -> tuple[tuple[int, ...], ...]:
    """Return the time of each piece by card: its weights read once, and 50 us beside."""
    return tuple(
        tuple(int(piece.weight_bytes / bandwidth) + 50_000 for piece in pieces) for _, bandwidth in CARDS.values()
    )


def partly_used_hosts(
    seed: int, *, scarce: bool, hosts: int = 42, gpus: int = 82, stages: int = 16
) -> PlacementProblem:
    """Return 80 uneven layers for 16 stages on hosts of one to four GPUs, two thirds of them partly used.

    ``scarce``: few of the fast cards, so that slow ones have to take part.
    """
    rng = random.Random(seed)
    counts = [1] * hosts
    while sum(counts) < gpus:
        host = rng.randrange(hosts)
        counts[host] += counts[host] < 4
    weights = (1, 4, 6, 9) if scarce else (2, 3, 3, 2)
    nodes = []
    for host, count in enumerate(counts):
        used = [rng.choice([0, rng.randrange(950), rng.randrange(950)]) for _ in range(count)]
        nodes.append(Node(name=f"host{host}", model=rng.choices(_HOST_CARDS, weights=weights)[0], used=used))
    return placement(nodes, LLAMA_70B.pieces(seed), stages=stages, min_kv_tokens=MIN_KV_TOKENS)


def placement(
    nodes: Sequence[Node], pieces: Sequence[Piece], *, stages: int, min_kv_tokens: int, **values: object
) -> PlacementProblem:
    """Return the problem of placing ``pieces`` on what is left of ``nodes``."""
    places, charges = [], []
    numbers = {card: index for index, card in enumerate(CARDS)}
    for node in nodes:
        for gpu, used in enumerate(node.used):
            name = f"{node.name}:{gpu}"
            if node.free_bytes(gpu) <= FIXED_BYTES:
                continue
            places.append(
                Place(
                    name=name,
                    device_ids=(name,),
                    speed_class=numbers[node.model],
                    free_bytes=node.free_bytes(gpu),
                    fixed_bytes=FIXED_BYTES,
                    host=node.name,
                )
            )
            points = _SHARED_POINTS if used else _WHOLE_POINTS
            charges.append(Charge(device_ids=frozenset({name}), points=points))
    hosts = {place.host for place in places}
    given: dict[str, object] = {
        "pieces": tuple(pieces),
        "class_ns": class_times(pieces),
        "places": tuple(places),
        "num_stages": stages,
        "hops": Hops(network_ns=NETWORK_NS, same_host_ns=dict.fromkeys(hosts, HOST_NS)),
        "min_kv_tokens": min_kv_tokens,
        "charges": tuple(charges),
    }
    return PlacementProblem(**{**given, **values})  # type: ignore[arg-type]
