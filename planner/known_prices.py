"""What devices were worth in an earlier answer, by name: any prices give a bound, so old ones do for a new problem."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.placement_problem import PlacementProblem
from planner.priced_paths import PricedPaths
from planner.reach import Floats, Kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPrices:
    """Prices in stages: of places, and of each device of hosts that have groups."""

    of_place: Mapping[str, float] = field(default_factory=dict)
    of_host: Mapping[str, float] = field(default_factory=dict)


def named(prices: Floats, *, kinds: Kinds, paths: PricedPaths) -> KnownPrices:
    """Return prices by the names of what they are for."""
    places = kinds.problem.places
    rows = _rows(kinds, paths)
    hosts = {
        host: float(price)
        for owner, price in zip(paths.members, prices[len(paths.rows) :], strict=True)
        for host in kinds.hosts[owner].hosts
    }
    return KnownPrices(
        of_place={place.name: float(prices[row]) for place, row in zip(places, rows, strict=True)}, of_host=hosts
    )


def prices_from(known: KnownPrices, *, kinds: Kinds, paths: PricedPaths) -> Floats:
    """Return prices for a problem from those of another one with much the same places.

    What was not there before is worth what its nearest like was; what has no room for any piece is worth nothing.
    """
    problem = kinds.problem
    sums, counts = np.zeros(len(paths.rows)), np.zeros(len(paths.rows))
    least = min(problem.least_bytes(piece) for piece in problem.pieces)
    for number, row in enumerate(_rows(kinds, paths)):
        place = problem.places[number]
        counts[row] += 1
        if place.room_bytes + sum(place.held.values()) >= least:
            price = known.of_place.get(place.name)
            sums[row] += _nearest_price(known, problem, number) if price is None else price
    members = [
        [known.of_host[host] for host in kinds.hosts[owner].hosts if host in known.of_host] for owner in paths.members
    ]
    of_hosts = [sum(found) / len(found) if found else 0.0 for found in members]
    return np.concatenate([sums / counts, of_hosts])


def _rows(kinds: Kinds, paths: PricedPaths) -> list[int]:
    """Return the row of each place."""
    row_of = {pair: row for row, pair in enumerate(paths.rows)}
    places = zip(kinds.problem.places, kinds.of_place, strict=True)
    return [row_of[kinds.class_of_host[place.host], kind] for place, kind in places]


def _nearest_price(known: KnownPrices, problem: PlacementProblem, number: int) -> float:
    place = problem.places[number]
    alike = [
        (abs(other.room_bytes + sum(other.held.values()) - place.room_bytes), known.of_place[other.name])
        for other in problem.places
        if other.name in known.of_place and other.speed_class == place.speed_class
    ]
    return min(alike, default=(0, 0.0))[1]
