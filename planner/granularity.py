"""Which number of stages suits the traffic: FlexPipe's Eq 4 (score), Eq 5 (instances) and Eq 9 (shared devices)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf

from planner.prediction import Prediction

Outlook = Callable[[float, float], Prediction]  # of one replica, at a rate (1/s) and a CV


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One granularity that a replica could have, with what the profile says of it.

    Attributes:
        throughput_per_s: T_k: requests that one replica can serve for ever.
        latency_s: L_k: mean time of a request from arrival to the last token, in calm traffic.
        best_cv: nu_k: the CV at which it does best against the others; None: at none.
        change_s: How long a change to it holds requests up (the commit pause and what slows steps before it).
        start_s: T until a new replica of it serves: load, or warm start where its parameters are in host memory; with
            what it takes to try it out, which on a wake the first request takes longer.
        start_in_words: Where that is from; empty: it is a guess.
        devices: That one replica occupies.
        shared_devices: Of them, those that other tenants use.
        most_replicas: That fit now, those in force included.
        room: Further replicas that fit beside all that serve; None: ``most_replicas`` less those of it in force.
        outlook: What one replica would do; None where only the figures above are known.
    """

    num_stages: int
    throughput_per_s: float
    latency_s: float
    best_cv: float | None
    change_s: float = 0.0
    start_s: float = 0.0
    start_in_words: str = ""
    devices: int = 1
    shared_devices: int = 0
    most_replicas: int = 1
    room: int | None = None
    outlook: Outlook | None = None

    def __post_init__(self) -> None:
        if self.num_stages < 1 or self.devices < 1 or not 0 <= self.shared_devices <= self.devices:
            raise ValueError(f"an impossible candidate of {self.num_stages} stages on {self.devices} devices")
        if not (self.throughput_per_s > 0 and self.latency_s > 0):
            raise ValueError(f"{self.num_stages} stages: throughput and latency must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConstants:
    """Of Eq 4, 5 and 9. The paper gives no values.

    Attributes:
        alpha: Weight of throughput against latency; evenly, as nothing speaks for either.
        sigma: How far off its best CV a granularity still counts: at a distance of sigma, 37 %. 4 spans the difference
            between calm traffic and the bursts of recorded traces (CV 1 and 13 as means, mostly below 8) in two steps.
        beta1, beta2: Capacity of a replica is T_k / (beta1 + beta2 * stages). T_k comes from a profile that has the
            hops in it, so more stages cost nothing further: 1 and 0.
        shared, shared_per_cv2: Score lost when all devices are shared, at CV 0, and how it grows with CV^2.
    """

    alpha: float = 0.5
    sigma: float = 4.0
    beta1: float = 1.0
    beta2: float = 0.0
    shared: float = 0.02
    shared_per_cv2: float = 0.35


def scores(candidates: Sequence[Candidate], *, cv: float, constants: ScoreConstants) -> tuple[float, ...]:
    """Return Eq 4 less Eq 9 for each candidate, 0 to 1; comparable with each other only.

    Source: FlexPipe, Eq 4: ``[alpha T_k/T_max + (1 - alpha) L_min/L_k] exp(-|nu - nu_k|/sigma)``. ``nu`` is the CV, as
    the paper's text has it (its Algorithm 1 says the derivative of the rate).
    """
    if not candidates:
        return ()
    fastest = max(each.throughput_per_s for each in candidates)
    soonest_s = min(each.latency_s for each in candidates)
    return tuple(_score(each, fastest, soonest_s, cv, constants) for each in candidates)


def _score(each: Candidate, fastest: float, soonest_s: float, cv: float, constants: ScoreConstants) -> float:
    if each.best_cv is None:
        return 0.0
    merit = constants.alpha * each.throughput_per_s / fastest + (1 - constants.alpha) * soonest_s / each.latency_s
    return max(0.0, merit * exp(-abs(cv - each.best_cv) / constants.sigma) - shared_penalty(each, cv, constants))


def shared_penalty(candidate: Candidate, cv: float, constants: ScoreConstants) -> float:
    """Return what neighbours on its devices cost a candidate: more in bursts, when all want to compute at once.

    Source: FlexPipe, Eq 9: ``gamma0 (1 + alpha CV^2)`` for each GPU that holds more than one stage.
    """
    share = candidate.shared_devices / candidate.devices
    return constants.shared * (1 + constants.shared_per_cv2 * cv**2) * share


def replica_rate_per_s(candidate: Candidate, constants: ScoreConstants) -> float:
    """Return mu_k of Eq 5, what one replica is taken to serve."""
    return candidate.throughput_per_s / (constants.beta1 + constants.beta2 * candidate.num_stages)


def instances(candidate: Candidate, *, rate_per_s: float, load_limit: float, constants: ScoreConstants) -> int:
    """Return how many replicas serve ``rate_per_s``, each loaded to ``load_limit`` at most; 1 at least.

    Source: FlexPipe, Eq 5, which rounds down. That leaves up to one replica's arrivals unserved, so here it is up.
    """
    each = replica_rate_per_s(candidate, constants) * load_limit
    return max(1, ceil(rate_per_s / each)) if each > 0 else 1


def expected_latency_s(
    candidate: Candidate, *, rate_per_s: float, cv: float, replicas: int, output_tokens: float
) -> float | None:
    """Return the mean latency of a request with so many tokens out; inf above capacity, None where nothing is known."""
    if candidate.outlook is None:
        return None
    found = candidate.outlook(rate_per_s / max(1, replicas), cv)
    return inf if found.is_saturated else found.ttft_s + max(0.0, output_tokens - 1) * found.tpot_s
