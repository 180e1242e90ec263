"""Which candidate is the best, and why each of the others lost: the planner's aims over numbers of stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isinf
from typing import Final

from planner.candidate_plan import Found
from planner.workload import Workload
from topology.units import format_bytes

TOLERANCE: Final = 0.01  # what a later aim may give away of goodput and of KV capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One aim: what counts (less is better), how much of it may be given away, and how a loss is told."""

    name: str
    loss: Callable[[Found], float]
    tolerance: float
    told: Callable[[Found, Found, Workload], str]  # of the loser and the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The best candidate, by its key, the aim that decided, and the reason why each other one lost."""

    best: int
    decided_by: str
    reasons: Mapping[int, str]


def choose(candidates: Mapping[int, Found], workload: Workload) -> Choice:
    """Return the best of ``candidates``: one aim after the other, each among those that the aims before left.

    1. predicted goodput, within 1 %
    2. the smallest KV capacity over the stages, within 1 %
    3. the cost of the change from the layout in force
    4. fragmentation, and devices shared with others
    5. bytes moved
    6. time to the first token, then the number of stages: only where all else is equal

    Raises:
        ValueError: There is no candidate.
    """
    left, reasons, decided_by = dict(candidates), dict[int, str](), "the only one that can be"
    for aim in AIMS:
        limit = _limit(min(aim.loss(found) for found in left.values()), aim.tolerance)
        best = min(left.values(), key=aim.loss)
        lost = {key: found for key, found in left.items() if aim.loss(found) > limit}
        reasons |= {key: aim.told(found, best, workload) for key, found in lost.items()}
        left = {key: found for key, found in left.items() if key not in lost}
        if lost:
            decided_by = aim.name
    best_key = next(iter(left))
    reasons |= {key: "equal in everything, and later in the list" for key in left if key != best_key}
    return Choice(best=best_key, decided_by=decided_by, reasons=reasons)


def _limit(best: float, tolerance: float) -> float:
    """Return the loss up to which a candidate stays. Losses of what should be large are negative."""
    return best + tolerance * abs(best) if not isinf(best) else best


def _goodput_told(found: Found, best: Found, workload: Workload) -> str:
    mine, theirs = found.prediction.goodput_per_s, best.prediction.goodput_per_s
    share = f"{(1 - mine / theirs) * 100:.0f} % less goodput" if theirs else "less goodput"
    return f"{share}: {mine:.3g} of {workload.rate_per_s:.3g} requests/s in time"


def _kv_told(found: Found, best: Found, _workload: Workload) -> str:
    return f"KV cache for {_kv_tokens(found):,} tokens, {_kv_tokens(best):,} are possible"


def _kv_tokens(found: Found) -> int:
    """Return the KV capacity of all replicas together."""
    return found.kv_tokens * len(found.pipelines)


def _change_told(found: Found, best: Found, _workload: Workload) -> str:
    extra = found.costs.change_s - best.costs.change_s
    return f"the change costs {extra * 1000:.3g} ms more and serves no better"


def _fragmentation_told(found: Found, best: Found, _workload: Workload) -> str:
    more = _num_devices(found) - _num_devices(best)
    if more > 0:
        return f"takes {more} more {'device' if more == 1 else 'devices'} and serves no better"
    return "breaks more whole devices, or shares more with others, and serves no better"


def _num_devices(found: Found) -> int:
    return sum(len(pipeline.device_ids) for pipeline in found.pipelines)


def _moved_told(found: Found, best: Found, _workload: Workload) -> str:
    return f"moves {format_bytes(found.costs.moved_bytes - best.costs.moved_bytes)} more and serves no better"


def _ttft_told(found: Found, best: Found, _workload: Workload) -> str:
    mine, theirs = found.prediction.ttft_s, best.prediction.ttft_s
    if isinf(mine):
        return "the queue grows without bound"
    return f"first token {(mine / theirs - 1) * 100:.0f} % later, and no better otherwise"


def _stages_told(_found: Found, _best: Found, _workload: Workload) -> str:
    return "more stages, and no better"


AIMS: Final = (
    Aim(name="goodput", loss=lambda f: -f.prediction.goodput_per_s, tolerance=TOLERANCE, told=_goodput_told),
    Aim(name="KV capacity", loss=lambda f: -_kv_tokens(f), tolerance=TOLERANCE, told=_kv_told),
    Aim(name="cost of the change", loss=lambda f: f.costs.change_s, tolerance=0.0, told=_change_told),
    Aim(name="fragmentation", loss=lambda f: f.costs.fragmentation, tolerance=0.0, told=_fragmentation_told),
    Aim(name="bytes moved", loss=lambda f: f.costs.moved_bytes, tolerance=0.0, told=_moved_told),
    Aim(name="time to the first token", loss=lambda f: f.prediction.ttft_s, tolerance=TOLERANCE, told=_ttft_told),
    Aim(name="number of stages", loss=lambda f: len(f.pipelines[0].stages), tolerance=0.0, told=_stages_told),
)
