"""Statistics of measurements: medians, percentiles and gaps. Plain functions."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise


def median(values: Iterable[float]) -> float:
    """Return the median, NaN of nothing."""
    values = list(values)
    return statistics.median(values) if values else float("nan")


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least ``share`` (0 to 1) of the values do not exceed, NaN of nothing."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def gaps_inside(times_s: Sequence[float], start_s: float, end_s: float) -> list[float]:
    """Return the gaps between neighbouring times that lie wholly within the window."""
    return [b - a for a, b in pairwise(times_s) if a >= start_s and b <= end_s]


def largest_gap(times_s: Sequence[float], start_s: float, end_s: float) -> float:
    """Return the largest gap that overlaps the window, 0 when there is none."""
    return max((b - a for a, b in pairwise(times_s) if b > start_s and a < end_s), default=0.0)


def largest_gap_of(streams: Sequence[Sequence[float]], start_s: float, end_s: float) -> float:
    """Return the largest gap that overlaps the window, over all streams."""
    return max((largest_gap(times, start_s, end_s) for times in streams), default=0.0)


def slices(start_s: float, end_s: float, length_s: float) -> list[tuple[float, float]]:
    """Cut a window into pieces of ``length_s`` side by side; one that is shorter stays whole."""
    count = int((end_s - start_s) / length_s) if length_s > 0 else 0
    if count == 0:
        return [(start_s, end_s)]
    return [(start_s + i * length_s, start_s + (i + 1) * length_s) for i in range(count)]
