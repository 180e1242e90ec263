"""Random placement problems, and the best placement by looking at every one."""

import random
from collections.abc import Iterator
from itertools import combinations, permutations

from planner.placement import PlacedStage, Scores, bottleneck_limit_ns, kv_limit_tokens, score
from planner.placement_problem import KV_UNLIMITED, Charge, Hops, Piece, Place, PlacementProblem


def small_problem(seed: int) -> PlacementProblem:
    """Return a problem of a few pieces and places: uneven pieces, mixed and partly used devices, links of any kind."""
    rng = random.Random(seed)
    num_pieces, num_devices = rng.randint(1, 8), rng.randint(1, 6)
    num_stages = rng.randint(1, min(num_pieces, num_devices, 4))
    num_classes = rng.randint(1, 3)
    base = [rng.randint(20, 60) for _ in range(num_pieces)]
    speeds = [rng.choice([10, 13, 19, 23, 42]) for _ in range(num_classes)]
    pieces = tuple(
        Piece(
            weight_bytes=rng.randint(20, 60),
            kv_bytes_per_token=rng.choice([0, 1, 2, 2, 3]),
            live_kv_bytes=rng.choice([0, 0, 7]),
        )
        for _ in range(num_pieces)
    )
    devices = _devices(rng, num_devices, num_pieces, num_stages, num_classes, pieces)
    places = devices + (_groups(rng, devices) if rng.random() < 0.3 else ())
    fixed_order = rng.random() < 0.15
    min_kv_tokens = rng.choice([0, 1, 10, 20])
    return PlacementProblem(
        pieces=pieces,
        class_ns=tuple(tuple(cost * speed for cost in base) for speed in speeds),
        places=devices if fixed_order else places,
        num_stages=num_stages,
        hops=_hops(rng, places),
        min_kv_tokens=min_kv_tokens,
        useful_kv_tokens=rng.choice([KV_UNLIMITED, KV_UNLIMITED, min_kv_tokens, min_kv_tokens + 15]),
        latency_limit_ns=rng.choice([None, None, sum(base) * 20 + 500]),
        charges=_charges(rng, devices),
        risk_ns=rng.choice([0, 100]),
        fixed_order=fixed_order,
        tied_bytes=rng.choice([0, 10]),
    )


def _devices(
    rng: random.Random,
    count: int,
    num_pieces: int,
    num_stages: int,
    num_classes: int,
    pieces: tuple[Piece, ...],
) -> tuple[Place, ...]:
    hosts = rng.randint(1, count)
    size = 60 * num_pieces // num_stages
    holds = rng.random() < 0.5
    found = []
    for index in range(count):
        host = rng.randrange(hosts)
        held = {}
        if holds:
            first = rng.randrange(num_pieces)
            owned = range(first, min(num_pieces, first + rng.randint(0, 3)))
            held = {p: pieces[p].weight_bytes + rng.choice([0, 10]) * pieces[p].kv_bytes_per_token for p in owned}
        found.append(
            Place(
                name=f"gpu{index}",
                device_ids=(f"gpu{index}",),
                speed_class=rng.randrange(num_classes),
                free_bytes=rng.choice([size, size * 2, rng.randint(size // 2, size * 2)]),
                fixed_bytes=rng.choice([0, 5]),
                host=f"host{host}",
                rack=f"rack{host % 2}",
                held=held,
                arrival_bytes_per_s=rng.choice([10**8, 3 * 10**8]),
            )
        )
    return tuple(found)


def _groups(rng: random.Random, devices: tuple[Place, ...]) -> tuple[Place, ...]:
    found = []
    for a, b in combinations(devices, 2):
        if a.host == b.host and a.speed_class == b.speed_class and rng.random() < 0.6 and len(found) < 2:
            found.append(
                Place(
                    name=f"{a.name}+{b.name}",
                    device_ids=(a.name, b.name),
                    speed_class=rng.randrange(a.speed_class + 1),
                    free_bytes=a.free_bytes + b.free_bytes,
                    fixed_bytes=a.fixed_bytes + b.fixed_bytes,
                    host=a.host,
                    rack=a.rack,
                )
            )
    return tuple(found)


def _hops(rng: random.Random, places: tuple[Place, ...]) -> Hops:
    network = rng.choice([0, 200, 1500])
    hosts, racks = sorted({place.host for place in places}), sorted({place.rack for place in places})
    links = [(a.name, b.name) for a in places for b in places if a is not b]
    own = {"none": 0, "few": 3, "all": len(links)}[rng.choice(["none", "none", "few", "all"])]
    return Hops(
        network_ns=network,
        same_host_ns={host: network // rng.randint(2, 9) for host in hosts if rng.random() < 0.8},
        same_rack_ns={rack: network // 2 for rack in racks if rng.random() < 0.4},
        pairs={link: rng.randint(0, 1600) for link in rng.sample(links, min(own, len(links)))},
    )


def _charges(rng: random.Random, devices: tuple[Place, ...]) -> tuple[Charge, ...]:
    alone = [
        Charge(device_ids=frozenset(place.device_ids), points=rng.randint(0, 9))
        for place in devices
        if rng.random() < 0.7
    ]
    hosts = {place.host for place in devices if rng.random() < 0.5}
    whole = [
        Charge(
            device_ids=frozenset(device for place in devices if place.host == host for device in place.device_ids),
            points=rng.randint(1, 12),
        )
        for host in sorted(hosts)
    ]
    return tuple(alone + whole)


def all_scores(problem: PlacementProblem) -> Iterator[Scores]:
    """Yield the scores of every placement that keeps the rules."""
    count, last = len(problem.pieces), len(problem.places) - 1
    for chosen in permutations(range(len(problem.places)), problem.num_stages):
        if problem.fixed_order and (list(chosen) != sorted(chosen) or (chosen[0], chosen[-1]) != (0, last)):
            continue
        devices = [device for place in chosen for device in problem.places[place].device_ids]
        if len(set(devices)) < len(devices):
            continue
        for cuts in combinations(range(1, count), problem.num_stages - 1):
            bounds = (0, *cuts, count)
            stages = [PlacedStage(place=p, first=bounds[i], end=bounds[i + 1]) for i, p in enumerate(chosen)]
            scores = score(problem, stages)
            limit = problem.latency_limit_ns
            if scores.kv_tokens >= problem.min_kv_tokens and (limit is None or scores.latency_ns <= limit):
                yield scores


def brute_force(problem: PlacementProblem) -> tuple[int, int, int, int, int] | None:
    """Return the best value of each aim within what those before it reached, None where nothing fits."""
    found = list(all_scores(problem))
    if not found:
        return None
    bottleneck = min(scores.bottleneck_ns for scores in found)
    found = [scores for scores in found if scores.bottleneck_ns <= bottleneck_limit_ns(bottleneck)]
    tokens = max(scores.kv_tokens for scores in found)
    found = [scores for scores in found if scores.kv_tokens >= kv_limit_tokens(tokens)]
    rest = min((scores.change_ns, scores.fragmentation, scores.moved_bytes) for scores in found)
    return (bottleneck, tokens, *rest)
