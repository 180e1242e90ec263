"""How many replicas, and whether a new one comes in time: FlexPipe's Eq 11, 12 and 13."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, floor, inf


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleConstants:
    """Of Eq 11 to 13. The paper gives no values.

    Attributes:
        beta: Share of the peak that Eq 11 asks for with no queue at all, 1 / (1 + beta): 7/3 for 30 %, which is what
            the paper reports to keep always on.
        gamma: With it a full queue (q = 1) at CV 1 asks for 90 % of the peak: ln(9 beta).
        queue_full: Q_max: waiting requests from which the queue counts as full.
        due_share: r_j: the share of the requests that wait which a scale-up must serve before they are due.
        held_weight, held_fades_per_s, free_weight: Eq 13: a host that held the model counts as much as one free device
            more, and half of that after 5 minutes (the reclamation window).
    """

    beta: float = 7 / 3
    gamma: float = 3.045
    queue_full: float = 64.0
    due_share: float = 1.0
    held_weight: float = 1.0
    held_fades_per_s: float = 0.00231
    free_weight: float = 1.0


def wanted_instances(*, most: int, cv: float, queue_length: float, constants: ScaleConstants) -> int:
    """Return m of Eq 11 for at most ``most`` replicas: what a queue of this length asks for in such bursts.

    Source: FlexPipe, Eq 11: ``floor(G_max / (1 + beta exp(-gamma cv q)))``, ``q = min(queue / Q_max, 1)``.
    """
    full = min(queue_length / constants.queue_full, 1.0)
    return floor(most / (1 + constants.beta * exp(-constants.gamma * cv * full)))


def serves_in_time(
    *,
    serving_per_s: Sequence[float],
    coming_per_s: Sequence[float],
    start_s: float,
    queue_length: float,
    deadline_s: float,
    constants: ScaleConstants,
) -> bool:
    """Say whether replicas serve what waits within ``deadline_s``, where some come one after the other.

    Args:
        serving_per_s: What each of those serves that are there.
        coming_per_s: What each of those will serve that come, in their order.
        start_s: What each of these takes to start, once the one before it serves.

    Source: FlexPipe, Eq 12: ``(T - S) * sum mu / Q >= r``. There all that come take one start-up time S together, so
    that all replicas count from then on. Here the second starts when the first serves, so it counts from 2 S on, and
    the n-th from n S. Those that are there count from S, as in the paper: until then they have who comes meanwhile.
    """
    if queue_length <= 0:
        return True
    served = max(0.0, deadline_s - start_s) * sum(serving_per_s)
    for place, rate_per_s in enumerate(coming_per_s, start=1):
        served += max(0.0, deadline_s - place * start_s) * rate_per_s
    return served / queue_length >= constants.due_share


def host_affinity(*, held_ago_s: float | None, free_devices: int, constants: ScaleConstants) -> float:
    """Return how well a host suits a new replica; ``held_ago_s``: since the model's parameters left it, None: never.

    Source: FlexPipe, Eq 13.
    """
    since_s = inf if held_ago_s is None else held_ago_s
    return constants.held_weight * exp(-constants.held_fades_per_s * since_s) + constants.free_weight * free_devices
