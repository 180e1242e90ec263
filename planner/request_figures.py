"""What requests saw, as figures: TTFT, TPOT, latency and goodput, alike for measured and simulated requests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from planner.workload import Slo

SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99_9": 0.999}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTimes:
    """One request. Times in seconds on one clock; ``first_token_s`` and ``end_s`` are None where it failed."""

    arrival_s: float
    first_token_s: float | None
    end_s: float | None
    prompt_tokens: int
    output_tokens: int  # that were made
    failure: str = ""

    @property
    def is_served(self) -> bool:
        return not self.failure and self.end_s is not None

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def latency_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Return the mean time between two tokens; None of an answer of one token."""
        if self.end_s is None or self.first_token_s is None or self.output_tokens < 2:
            return None
        return (self.end_s - self.first_token_s) / (self.output_tokens - 1)

    def meets(self, slo: Slo) -> bool:
        """Return whether it was served, and within the targets."""
        if not self.is_served:
            return False
        ttft, tpot = self.ttft_s, self.tpot_s
        return (slo.ttft_s is None or (ttft is not None and ttft <= slo.ttft_s)) and (
            slo.tpot_s is None or tpot is None or tpot <= slo.tpot_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean, percentiles (nearest rank) and maximum, in the unit of the values. Empty: all None."""

    count: int
    mean: float | None
    percentiles: dict[str, float | None]
    maximum: float | None


def distribution(values: Iterable[float]) -> Distribution:
    """Return the distribution of some values."""
    ordered = sorted(values)
    if not ordered:
        return Distribution(count=0, mean=None, percentiles=dict.fromkeys(SHARES), maximum=None)
    return Distribution(
        count=len(ordered),
        mean=fmean(ordered),
        percentiles={name: ordered[ceil(share * len(ordered)) - 1] for name, share in SHARES.items()},
        maximum=ordered[-1],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All requests of a run together. Rates are per second of ``duration_s``: first arrival to last end.

    ``goodput_per_s``: requests served within the targets; ``attainment``: their share of all, failed ones included.
    """

    requests: int
    failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    attainment: float
    ttft_s: Distribution
    tpot_s: Distribution
    latency_s: Distribution


def figures(requests: Sequence[RequestTimes], slo: Slo) -> Figures:
    """Return the figures of a run. ``ValueError``: there is no request."""
    if not requests:
        raise ValueError("no requests")
    served = [each for each in requests if each.is_served]
    start_s = min(each.arrival_s for each in requests)
    end_s = max((each.end_s for each in served if each.end_s is not None), default=start_s)
    duration_s = max(end_s - start_s, 1e-9)
    good = sum(each.meets(slo) for each in served)
    return Figures(
        requests=len(requests),
        failed=len(requests) - len(served),
        duration_s=duration_s,
        requests_per_s=len(served) / duration_s,
        output_tokens_per_s=sum(each.output_tokens for each in served) / duration_s,
        goodput_per_s=good / duration_s,
        attainment=good / len(requests),
        ttft_s=distribution(each.ttft_s for each in served if each.ttft_s is not None),
        tpot_s=distribution(each.tpot_s for each in served if each.tpot_s is not None),
        latency_s=distribution(each.latency_s for each in served if each.latency_s is not None),
    )
