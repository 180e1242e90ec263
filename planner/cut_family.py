"""Nested cuts: each cut of few stages is a cut of all finer ones, so that merging and splitting stages moves little.

    8 stages  |..|..|.|..|.|..|..|..|
    4 stages  |.....|...|....|......|      every cut is one of those above
    2 stages  |.........|...........|

The finest cuts are the most even there are; each coarser number of stages keeps those of them that leave it most even.
Source: FlexPipe, section on fine-grained partitioning, whose refactoring penalty R(S) is after the same.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

Cuts = tuple[int, ...]


def nested_cuts(seconds: Sequence[float], counts: Sequence[int]) -> Mapping[int, Cuts]:
    """Return the cuts for each of ``counts`` stages, as the first piece of each stage but the first.

    ``seconds`` are those of each piece; more stages than pieces cannot be cut and are left out. Exact at each step:
    given the finer cuts, no choice among them has a smaller slowest stage; ties go to the earlier cuts.
    """
    found: dict[int, Cuts] = {}
    cuts: Cuts = tuple(range(1, len(seconds)))
    for count in sorted((count for count in set(counts) if 1 <= count <= len(seconds)), reverse=True):
        cuts = found[count] = _most_even(seconds, cuts, count)
    return found


def family_counts(limit: int) -> tuple[int, ...]:
    """Return the numbers of stages that form a family up to ``limit``: doubling, and ``limit`` itself."""
    return tuple(sorted({limit, *(2**power for power in range(limit.bit_length()))}))


def _most_even(seconds: Sequence[float], allowed: Cuts, count: int) -> Cuts:
    """Return ``count - 1`` of ``allowed`` whose slowest stage is fastest, by dynamic programming over the last cut."""
    total = list(accumulate(seconds, initial=0.0))
    bounds = (0, *allowed, len(seconds))
    best: dict[int, tuple[float, Cuts]] = {0: (0.0, ())}  # slowest stage and cuts so far, by position of the last bound
    for stage in range(count):
        left = count - stage - 1
        reached: dict[int, tuple[float, Cuts]] = {}
        for origin, (slowest, cuts) in best.items():
            for position in range(origin + 1, len(bounds) - left):
                if left == 0 and position != len(bounds) - 1:
                    continue
                worst = max(slowest, total[bounds[position]] - total[bounds[origin]])
                if position not in reached or worst < reached[position][0]:
                    reached[position] = (worst, cuts if left == 0 else (*cuts, bounds[position]))
        best = reached
    return best[len(bounds) - 1][1]
