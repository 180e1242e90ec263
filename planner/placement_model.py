"""The placement problem as a flow of pieces over places, for CP-SAT. One rule or one aim is one method.

A stage is an edge from the piece it begins with to the piece after its end. Between two stages the flow passes a hub:
the set of places from which a hop into the next place costs no more than a certain time. Few links have a time of
their own (inside a host, inside a rack, the network), so there are few hubs.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from planner.placement import (
    Aim,
    PlacedStage,
    Scores,
    bottleneck_limit_ns,
    kv_limit_tokens,
    score,
)
from planner.placement_problem import PlacementProblem
from planner.segments import Segment, within
from planner.solver import Answer, Linear, Model, Variable, minimize

Hub = frozenset[int]  # the places from which it is entered


class PlacementModel:
    """The problem over some of its places and some segments on them, which the caller must know to suffice.

    Args:
        segments: What each place may carry, by its number.
        bottleneck_ns: No stage, with the hop into it, takes longer.
    """

    def __init__(
        self, problem: PlacementProblem, segments: Mapping[int, Sequence[Segment]], *, bottleneck_ns: int
    ) -> None:
        self.problem = problem
        self.segments = {place: found for place, found in segments.items() if found}
        self.limit_ns = bottleneck_ns
        self.count = len(problem.pieces)
        self.stages: tuple[PlacedStage, ...] = ()  # of the best solution so far
        self.model = Model()
        self.takes = {place: [self.model.new_bool_var("") for _ in found] for place, found in self.segments.items()}
        self.levels = {place: self._levels(place) for place in self.segments}
        # enters[place, hub][p]: the stage on the place begins with piece p and is entered from the hub
        self.enters: dict[tuple[int, Hub], dict[int, Variable]] = {}
        self.used = {place: Linear.sum(takes) for place, takes in self.takes.items()}
        self.add_entries()
        self.add_flow()
        self.add_devices()
        self.add_stages()
        self.add_bottleneck()
        if problem.fixed_order:
            self.add_fixed_order()
        if problem.latency_limit_ns is not None:
            self.model.add(Linear.sum(list(self.busy.values())) <= problem.latency_limit_ns)

    def _levels(self, place: int) -> list[tuple[int, Hub]]:
        """Return the hubs into a place with the time of the hop from the farthest of each, the nearest first."""
        by_hop: dict[int, set[int]] = {}
        places = self.problem.places
        for other in self.segments:
            if self.problem.fixed_order and other >= place:
                continue
            by_hop.setdefault(self.problem.hops.between(places[other], places[place]), set()).add(other)
        found: list[tuple[int, Hub]] = []
        reached: set[int] = set()
        for hop in sorted(by_hop):
            reached |= by_hop[hop]
            if reached - {place}:
                found.append((hop, frozenset(reached)))
        return found

    # ---- rules

    def add_entries(self) -> None:
        """A stage behind the first is entered from one hub, near enough for the time that the stage takes."""
        for place, found in self.segments.items():
            firsts: dict[int, list[tuple[int, Variable]]] = {}
            for segment, take in zip(found, self.takes[place], strict=True):
                firsts.setdefault(segment.first, []).append((segment.time_ns, take))
            firsts.pop(0, None)
            for first, stages in firsts.items():
                fastest = min(took for took, _ in stages)
                near = [(hop, hub) for hop, hub in self.levels[place] if fastest + hop <= self.limit_ns]
                entries = [(hop, self.model.new_bool_var("")) for hop, _ in near]
                self.model.add(Linear.sum([take for _, take in stages]) == Linear.sum([entry for _, entry in entries]))
                for (_, hub), (_, entry) in zip(near, entries, strict=True):
                    self.enters.setdefault((place, hub), {})[first] = entry
                for index, (hop, _) in enumerate(entries):
                    short = [take for took, take in stages if took + hop <= self.limit_ns]
                    if len(short) < len(stages):
                        self.model.add(Linear.sum([entry for _, entry in entries[index:]]) <= Linear.sum(short))

    def add_flow(self) -> None:
        """Where a stage ends the next begins, entered from a hub that the place of the former belongs to."""
        hubs = {hub for _, hub in self.enters}
        leaves: dict[tuple[Hub, ...], list[int]] = {}
        for place in self.segments:
            leaves.setdefault(tuple(hub for hub in hubs if place in hub), []).append(place)
        into: dict[tuple[Hub, int], list[Variable]] = {}
        for memberships, places in leaves.items():
            ends: dict[int, list[Variable]] = {}
            for place in places:
                for segment, take in zip(self.segments[place], self.takes[place], strict=True):
                    if segment.end < self.count:
                        ends.setdefault(segment.end, []).append(take)
            for end, takes in ends.items():
                passes = [self.model.new_bool_var("") for _ in memberships]
                self.model.add(Linear.sum(takes) == Linear.sum(passes))
                for hub, passing in zip(memberships, passes, strict=True):
                    into.setdefault((hub, end), []).append(passing)
        outof: dict[tuple[Hub, int], list[Variable]] = {}
        for (_, hub), entries in self.enters.items():
            for first, entry in entries.items():
                outof.setdefault((hub, first), []).append(entry)
        for key in into.keys() | outof.keys():
            self.model.add(Linear.sum(into.get(key, [])) == Linear.sum(outof.get(key, [])))
        everything = [
            (segment, take)
            for place, found in self.segments.items()
            for segment, take in zip(found, self.takes[place], strict=True)
        ]
        self.model.add_exactly_one([take for segment, take in everything if segment.first == 0])
        self.model.add_exactly_one([take for segment, take in everything if segment.end == self.count])

    def add_devices(self) -> None:
        """A device carries one stage at most, alone or in a group."""
        sharing: dict[str, list[Variable]] = {}
        for place, takes in self.takes.items():
            for device in self.problem.places[place].device_ids:
                sharing.setdefault(device, []).extend(takes)
        for takes in {tuple(id(take) for take in takes): takes for takes in sharing.values()}.values():
            self.model.add_at_most_one(takes)

    def add_stages(self) -> None:
        """There are as many stages as were asked for."""
        self.model.add(Linear.sum(list(self.used.values())) == self.problem.num_stages)

    def add_bottleneck(self) -> None:
        """The time of each place, with the hop into it, is at most the bottleneck."""
        self.bottleneck = self.model.new_int_var(0, self.limit_ns, "bottleneck")
        self.busy = {}
        for place, found in self.segments.items():
            hops = [
                (entry, hop) for hop, hub in self.levels[place] for entry in self.enters.get((place, hub), {}).values()
            ]
            terms = [*self.takes[place], *(entry for entry, _ in hops)]
            times = [segment.time_ns for segment in found] + [hop for _, hop in hops]
            self.busy[place] = Linear.weighted_sum(terms, times)
            self.model.add(self.busy[place] <= self.bottleneck)

    def add_fixed_order(self) -> None:
        """The first and the last place carry the first and the last stage."""
        for place, at_end in ((0, False), (len(self.problem.places) - 1, True)):
            found = zip(self.segments.get(place, ()), self.takes.get(place, ()), strict=True)
            ends = [take for segment, take in found if (segment.end == self.count if at_end else segment.first == 0)]
            self.model.add(Linear.sum(ends) == 1)

    # ---- aims, all to be minimised

    def aim(self, aim: Aim) -> Linear | Variable:
        """Return what the solver minimises for an aim."""
        match aim:
            case Aim.BOTTLENECK:
                return self.bottleneck
            case Aim.KV_CAPACITY:
                return self._lost_kv()
            case Aim.FRAGMENTATION:
                return self._fragmentation()
            case Aim.CHANGE:
                return self._sum([[segment.change_ns for segment in found] for found in self.segments.values()])
            case Aim.MOVED:
                return self._sum([[segment.moved_bytes for segment in found] for found in self.segments.values()])

    def _lost_kv(self) -> Variable:
        """Return the negated KV capacity of the smallest stage."""
        most = max((segment.kv_tokens for found in self.segments.values() for segment in found), default=0)
        lost = self.model.new_int_var(-most, 0, "lost_kv")
        for place, found in self.segments.items():
            missing = [segment.kv_tokens - most for segment in found]
            self.model.add(-lost <= most + Linear.weighted_sum(self.takes[place], missing))
        return lost

    def _fragmentation(self) -> Linear:
        """Return the points of the charges that are touched."""
        touched, points = [], []
        for charge in self.problem.charges:
            places = [place for place in self.segments if within(self.problem.places[place], charge.device_ids)]
            if not places or charge.points == 0:
                continue
            touch = self.model.new_bool_var("")
            for place in places:
                self.model.add(self.used[place] <= touch)
            touched.append(touch)
            points.append(charge.points)
        return Linear.weighted_sum(touched, points)

    def _sum(self, costs: Sequence[Sequence[int]]) -> Linear:
        takes = [take for found in self.takes.values() for take in found]
        return Linear.weighted_sum(takes, [cost for found in costs for cost in found])

    # ---- solving

    def minimize(self, aim: Aim, *, limit_s: float) -> Answer:
        """Search for the best value of an aim within what was kept so far; remember the stages that reach it."""
        answer = minimize(self.model, self.aim(aim), limit_s=limit_s)
        if answer.found:
            self.stages = self._found(answer)
            self.hint(self.stages)
        return answer

    def keep(self, aim: Aim, value: int) -> None:
        """Hold later aims to what this one reached, less what it may give away."""
        match aim:
            case Aim.BOTTLENECK:
                self.model.add(self.bottleneck <= bottleneck_limit_ns(value))
            case Aim.KV_CAPACITY:
                for place, found in self.segments.items():
                    for segment, take in zip(found, self.takes[place], strict=True):
                        if segment.kv_tokens < kv_limit_tokens(value):
                            self.model.add(take == 0)
            case Aim.CHANGE | Aim.FRAGMENTATION | Aim.MOVED:
                self.model.add(self.aim(aim) <= value)

    def hint(self, stages: Sequence[PlacedStage]) -> None:
        """Let the next search begin with these stages."""
        wanted = {(stage.place, stage.first, stage.end) for stage in stages}
        self.model.clear_hints()  # type: ignore[no-untyped-call]
        for place, found in self.segments.items():
            for segment, take in zip(found, self.takes[place], strict=True):
                self.model.add_hint(take, (place, segment.first, segment.end) in wanted)

    def scores(self) -> Scores:
        """Return the scores of the best stages so far."""
        return score(self.problem, self.stages)

    def _found(self, answer: Answer) -> tuple[PlacedStage, ...]:
        chosen = [
            PlacedStage(place=place, first=segment.first, end=segment.end)
            for place, found in self.segments.items()
            for segment, take in zip(found, self.takes[place], strict=True)
            if answer.value_of(take)
        ]
        ordered = sorted(chosen, key=lambda stage: stage.first)
        assert all(stage.end == following.first for stage, following in pairwise(ordered))
        return tuple(ordered)
