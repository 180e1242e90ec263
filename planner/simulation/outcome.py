"""What a simulation came to, and how two of its figures follow from what was seen. Pure."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from planner.request_figures import Figures, RequestTimes

_STALL_BEGINS, _STALL_ENDS = 1.5, 1.2  # times the 25th percentile of latency: FlexPipe's measure
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The timeline at one moment. ``ttft_s`` and ``latency_s``: means over requests that ended since the last one."""

    at_s: float
    replicas: dict[int, int]  # that serve, by number of stages
    coming: int
    cv: float | None
    rate_per_s: float
    queue: int  # requests without their first token
    running: int
    ttft_s: float | None
    latency_s: float | None
    devices: int  # reserved
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulation came to.

    Attributes:
        figures: Of all requests; those that had not ended when it was broken off count as failed.
        queue_mean: Requests without their first token, over time.
        stall_recovery_s: Median length of stalls: from latency above 1.5 times its 25th percentile to below 1.2 times.
        reserved_device_s, reserved_share_s: Devices held by replicas over time, and the share of their memory.
        busy_device_s: That stages computed.
        always_on: The fewest devices reserved at any time, over the most.
        changes: Of granularity, by replica.
        decisions: That began something: replicas that come, go or change; one counts once for however many replicas.
        most_decisions_per_min: In any 60 s.
    """

    figures: Figures
    queue_mean: float
    queue_most: int
    stall_recovery_s: float | None
    stalls: int
    reserved_device_s: float
    reserved_share_s: float
    busy_device_s: float
    most_devices: int
    always_on: float
    changes: int
    decisions: int
    most_decisions_per_min: int
    starts: int
    mean_start_s: float | None
    evicted: int
    events: int
    simulated_s: float
    samples: tuple[Sample, ...] = field(repr=False)
    requests: tuple[RequestTimes, ...] = field(repr=False)

    @property
    def goodput_per_device_s(self) -> float:
        """Requests served within the targets for each device-second that was reserved."""
        good = self.figures.attainment * self.figures.requests
        return good / self.reserved_device_s if self.reserved_device_s else 0.0

    @property
    def utilisation(self) -> float:
        return self.busy_device_s / self.reserved_device_s if self.reserved_device_s else 0.0


def most_in_a_minute(ats_s: Sequence[float]) -> int:
    """Return how many of these moments lie within one minute, at most. Two that lie 60 s apart do not."""
    ordered = sorted(ats_s)
    return max((bisect_left(ordered, at_s + _MINUTE_S) - first for first, at_s in enumerate(ordered)), default=0)


def stall_lengths(requests: Sequence[RequestTimes]) -> list[float]:
    """Return the seconds of each stall, by time to the first token in order of arrival.

    A stall begins when it exceeds 1.5 times its 25th percentile and ends when it is below 1.2 times (FlexPipe, which
    does not say of which latency; that to the first token does not depend on the length of answers).
    """
    seen = [(each.first_token_s, each.ttft_s) for each in requests if each.first_token_s is not None]
    points = sorted((at_s, ttft_s) for at_s, ttft_s in seen if ttft_s is not None)
    if not points:
        return []
    base_s = sorted(ttft_s for _, ttft_s in points)[len(points) // 4]
    lengths, began_s = [], None
    for at_s, ttft_s in points:
        if began_s is None and ttft_s > _STALL_BEGINS * base_s:
            began_s = at_s
        elif began_s is not None and ttft_s < _STALL_ENDS * base_s:
            lengths.append(at_s - began_s)
            began_s = None
    return lengths
