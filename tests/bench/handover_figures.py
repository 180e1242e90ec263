"""From the legs of the handover benchmark to its figures. Pure: no clock, no process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.handover_legs import Leg
from tests.bench.stats import gaps_inside, largest_gap, largest_gap_of, median, percentile, slices


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveFigures:
    """One move beside what is usual on the slower of its two layouts (the larger undisturbed p99 of the same gaps)."""

    leg: Leg
    engine_gap_s: float
    engine_control_s: float  # median over undisturbed windows as long as the move of the largest gap in each
    engine_p99_s: float
    client_gap_s: float
    client_control_s: float

    @property
    def engine_ratio(self) -> float:
        return self.engine_gap_s / self.engine_p99_s

    @property
    def client_ratio(self) -> float:
        return self.client_gap_s / self.client_control_s

    def to_wire(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return self.leg.to_wire() | {
            "engine_gap_s": self.engine_gap_s,
            "engine_control_s": self.engine_control_s,
            "engine_p99_s": self.engine_p99_s,
            "client_gap_s": self.client_gap_s,
            "client_control_s": self.client_control_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """The gaps of one layout without a move."""

    stages: int
    samples: int
    p50_s: float
    p99_s: float
    longest_s: float


def undisturbed(legs: Sequence[Leg], *, of_engine: bool) -> dict[int, Undisturbed]:
    """Return the gaps without a move, by number of stages: between steps of the engine, or tokens of each stream."""
    pooled: dict[int, list[float]] = {}
    for leg in legs:
        for stages, window in leg.control:
            for times in [leg.step_ends_s] if of_engine else leg.times_s:
                pooled.setdefault(stages, []).extend(gaps_inside(times, *window))
    return {
        stages: Undisturbed(
            stages=stages,
            samples=len(gaps),
            p50_s=median(gaps),
            p99_s=percentile(gaps, 0.99),
            longest_s=max(gaps, default=0.0),
        )
        for stages, gaps in sorted(pooled.items())
    }


def figures_of(legs: Sequence[Leg]) -> list[MoveFigures]:
    """Return the figures of every move, judged by the undisturbed windows of all legs."""
    engine, client = undisturbed(legs, of_engine=True), undisturbed(legs, of_engine=False)
    of_steps = engine if any(leg.step_ends_s for leg in legs) else client
    made = []
    for leg in legs:
        layouts = (leg.before, leg.after)
        slower = max(layouts, key=lambda stages: of_steps[stages].p99_s)
        # Fewer micro-batches make longer steps but may make shorter gaps between tokens: each side has its own slower.
        slower_to_clients = max(layouts, key=lambda stages: client[stages].p99_s)
        made.append(
            MoveFigures(
                leg=leg,
                engine_gap_s=largest_gap(leg.step_ends_s, *leg.move) if leg.step_ends_s else float("nan"),
                engine_control_s=_control(legs, slower, leg.move_s, of_engine=True),
                engine_p99_s=engine[slower].p99_s,
                client_gap_s=largest_gap_of(leg.times_s, *leg.move),
                client_control_s=_control(legs, slower_to_clients, leg.move_s, of_engine=False),
            )
        )
    return made


def _control(legs: Sequence[Leg], stages: int, length_s: float, *, of_engine: bool) -> float:
    """Return the median of the largest gaps in undisturbed windows of ``length_s`` on that layout."""
    largest = []
    for leg in legs:
        streams = leg.times_s
        if of_engine:
            streams = [leg.step_ends_s] if leg.step_ends_s else []
        for where, window in leg.control:
            if where == stages and streams:
                largest += [largest_gap_of(streams, *piece) for piece in slices(*window, length_s)]
    return median(largest)
