"""Of places that differ in nothing, the earlier ones carry the earlier stages: plans read alike, again and again.

The solver is free to take any of them. Which it takes changes no score, so the choice can be put in order afterwards.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from planner.placement import PlacedStage, score
from planner.placement_problem import Place, PlacementProblem


def in_order(problem: PlacementProblem, stages: Sequence[PlacedStage]) -> tuple[PlacedStage, ...]:
    """Return ``stages`` with equal places swapped so that they are used from the first on, scores unchanged."""
    if problem.fixed_order:
        return tuple(stages)
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, place in enumerate(problem.places):
        groups[_kind(place)].append(position)
    renamed: dict[int, int] = {}
    for members in groups.values():
        devices = [device for member in members for device in problem.places[member].device_ids]
        if len(set(devices)) < len(devices):
            continue  # groups that share devices are not free to be swapped
        taken = [stage.place for stage in stages if stage.place in members]
        renamed |= dict(zip(taken, sorted(members)[: len(taken)], strict=True))
    ordered = tuple(replace(stage, place=renamed.get(stage.place, stage.place)) for stage in stages)
    # Single links and charges may still tell places apart that look alike: then the solver's own choice stands.
    return ordered if score(problem, ordered) == score(problem, stages) else tuple(stages)


def _kind(place: Place) -> tuple[object, ...]:
    """Return what makes a place what it is, apart from its name. Places that hold anything stand for themselves."""
    return (
        place.name if place.held else "",
        place.speed_class,
        place.free_bytes,
        place.fixed_bytes,
        place.host,
        place.rack,
        place.island,
        place.arrival_bytes_per_s,
    )
