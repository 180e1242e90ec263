"""Betters stages that are there by exchanging places: quick, where the best is near, and it proves nothing.

Within limits each stage goes as far as its place reaches; what the last one leaves uncovered is what is missing. One
place after another is replaced by one to spare, or two change their positions, as long as that covers more.
"""

from collections.abc import Sequence

from planner.placement import PlacedStage
from planner.placement_search import Limits, PlacementSearch

_EXCHANGES = 24  # of places, before a search is given up


def look_near(search: PlacementSearch, limits: Limits, stages: Sequence[PlacedStage]) -> tuple[PlacedStage, ...] | None:
    """Return stages within ``limits`` on much the same places, None where exchanges lead to none."""
    near = _Near(search, limits)
    order = [stage.place for stage in stages]
    covered = near.covered(order)
    for _ in range(_EXCHANGES):
        if covered >= near.count or search.left_s() <= 0:
            break
        better, reached = near.best_exchange(order, covered)
        if reached <= covered:
            return None
        order, covered = better, reached
    return search.filled_up(order, limits) if covered >= near.count else None


class _Near:
    def __init__(self, search: PlacementSearch, limits: Limits) -> None:
        self.problem, self.count = search.problem, len(search.problem.pieces)
        reach = search.reach(limits)
        self.kind_of = search.kinds.of_place
        self.has_room = search.kinds.has_room
        self.start, self.far, self.near = reach.from_start.tolist(), reach.network.tolist(), reach.host.tolist()

    def reach(self, before: int | None, place: int) -> list[int]:
        """Return by first piece how far a place reaches behind another one; the first stage begins with piece 0."""
        kind = self.kind_of[place]
        if before is None:
            return [self.start[kind]]
        same = self.problem.places[before].host == self.problem.places[place].host
        row: list[int] = (self.near if same else self.far)[kind]
        return row

    def covered(self, order: Sequence[int]) -> int:
        """Return the pieces that stages on these places cover, each going as far as it can."""
        at, before = 0, None
        for place in order:
            at, before = self.reach(before, place)[at], place
        return at

    def best_exchange(self, order: list[int], covered: int) -> tuple[list[int], int]:
        """Return the order after the exchange that covers most, and what that covers."""
        best, most = order, covered
        prefixes, suffixes = self._prefixes(order), self._suffixes(order)
        spare = self._spare(order)
        for index, at in enumerate(prefixes):
            before = order[index - 1] if index else None
            for place in spare[index]:
                end = self.reach(before, place)[at]
                if index + 1 < len(order):
                    end = suffixes[index + 2][self.reach(place, order[index + 1])[end]]
                if end > most:
                    best, most = [*order[:index], place, *order[index + 1 :]], end
        if most == covered:  # exchanges among themselves are the dearer ones to look at
            for index in range(len(order)):
                for other in range(index + 1, len(order)):
                    swapped = list(order)
                    swapped[index], swapped[other] = order[other], order[index]
                    moved = [*order[:index], *order[index + 1 : other + 1], order[index], *order[other + 1 :]]
                    back = [*order[:index], order[other], *order[index:other], *order[other + 1 :]]
                    for changed in (swapped, moved, back):
                        if (end := self.covered(changed)) > most:
                            best, most = changed, end
        return best, most

    def _prefixes(self, order: Sequence[int]) -> list[int]:
        """Return the first piece of each stage."""
        found, before = [0], None
        for place in order[:-1]:
            found.append(self.reach(before, place)[found[-1]])
            before = place
        return found

    def _suffixes(self, order: Sequence[int]) -> list[list[int]]:
        """Return for each stage, and the end, what is covered from each piece with it on; not for the first stage."""
        found = [list(range(self.count + 1))]
        for index in range(len(order) - 1, 0, -1):
            row, after = self.reach(order[index - 1], order[index]), found[-1]
            found.append([after[end] for end in row])
        return [[], *reversed(found)]

    def _spare(self, order: Sequence[int]) -> list[list[int]]:
        """Return by position the places that could stand there instead: one of each kind, and of each host in use."""
        places = self.problem.places
        hosts = {places[place].host for place in order}
        seen: dict[tuple[int, str], int] = {}
        for place, kind in enumerate(self.kind_of):
            if self.has_room[kind] and place not in order:
                seen.setdefault((kind, places[place].host if places[place].host in hosts else ""), place)
        found = []
        for index in range(len(order)):
            used = {device for at, place in enumerate(order) if at != index for device in places[place].device_ids}
            found.append([place for place in seen.values() if used.isdisjoint(places[place].device_ids)])
        return found
