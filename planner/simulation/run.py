"""One simulation: a trace, devices, shapes and a system that decides; what the requests saw and what it took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from statistics import fmean, median

from planner.arrivals import Absence, Reading
from planner.load import WINDOWS_S, EngineSample, LoadMonitor
from planner.request_figures import Figures, RequestTimes, figures
from planner.simulation.clock import Clock
from planner.simulation.fleet import Fleet, FleetEvents, MemberState
from planner.simulation.pool import DevicePool, Placing
from planner.simulation.replica import SimulatedRequest
from planner.simulation.shape import Shapes
from planner.simulation.system import System
from planner.traces import TraceRequest
from planner.workload import Slo, Workload

_CV_WINDOW_S = 180.0
_STALL_BEGINS, _STALL_ENDS = 1.5, 1.2  # times the 25th percentile of latency: FlexPipe's measure


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """Neighbours take or free memory of a device."""

    at_s: float
    device: int
    num_bytes: int


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
    changes_per_min: float
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything but the system. ``drain_s``: how long after the last arrival requests may still end.

    ``expected``: Requests as they are expected before any has come, which routing goes by. ``windows_s``: over which
    arrivals are watched.
    """

    trace: Sequence[TraceRequest]
    shapes: Shapes
    slo: Slo
    expected: Workload
    placing: Placing = Placing.FRAGMENTS
    memory_changes: Sequence[MemoryChange] = ()
    interval_s: float = 5.0
    drain_s: float = 600.0
    windows_s: Sequence[float] = WINDOWS_S


def simulate(
    setting: Setting,
    pool: DevicePool,
    system: System,
    *,
    on_progress: Callable[[float, float], None] = lambda _now_s, _end_s: None,
) -> Outcome:
    """Run a simulation to its end. ``on_progress`` hears simulated seconds passed, and of how many.

    Raises:
        ValueError: The trace is empty.
    """
    return _Run(setting, pool, system, on_progress).outcome()


class _Run:
    def __init__(
        self, setting: Setting, pool: DevicePool, system: System, on_progress: Callable[[float, float], None]
    ) -> None:
        self._setting = setting
        self._system = system
        self._on_progress = on_progress
        self._clock = Clock()
        self._monitor = LoadMonitor(began_s=0.0, windows_s=setting.windows_s, slo=setting.slo)
        self._fleet = Fleet(
            self._clock,
            pool,
            setting.shapes,
            FleetEvents(on_first=self._first, on_end=self._ended),
            placing=setting.placing,
            expected=setting.expected,
        )
        self._requests: list[SimulatedRequest] = []
        self._since: list[SimulatedRequest] = []  # ended since the last sample
        self._left = len(setting.trace)
        self._samples: list[Sample] = []
        self._last_s = setting.trace[-1].arrival_s if setting.trace else 0.0
        self._end_s = self._last_s + setting.drain_s

    def outcome(self) -> Outcome:
        if not self._setting.trace:
            raise ValueError("an empty trace")
        self._system.begin(self._fleet)
        for change in self._setting.memory_changes:
            self._clock.at(change.at_s, lambda change=change: self._memory(change))  # type: ignore[misc]
        self._clock.at(self._setting.trace[0].arrival_s, self._arrive)
        now_s = 0.0
        while self._left and now_s < self._end_s:
            now_s += self._setting.interval_s
            self._clock.run(until_s=now_s)
            self._tick(now_s)
            self._on_progress(min(now_s, self._last_s), self._last_s)
        return self._told()

    # --- what happens ---

    def _arrive(self) -> None:
        """The next request of the trace comes, and with it all that come at the same moment."""
        trace, number = self._setting.trace, len(self._requests)
        each = trace[number]
        request = SimulatedRequest(
            number=number,
            arrival_s=each.arrival_s,
            prompt_tokens=each.prompt_tokens,
            output_tokens=each.output_tokens,
        )
        self._requests.append(request)
        self._monitor.arrived(number, self._clock.now_s, prompt_tokens=each.prompt_tokens)
        self._fleet.submit(request)
        if number + 1 < len(trace):
            self._clock.at(trace[number + 1].arrival_s, self._arrive)

    def _first(self, request: SimulatedRequest) -> None:
        self._monitor.first_token(request.number, request.first_token_s)

    def _ended(self, request: SimulatedRequest) -> None:
        self._left -= 1
        self._since.append(request)
        several = request.output_tokens > 1
        tpot_s = (request.end_s - request.first_token_s) / (request.output_tokens - 1) if several else None
        self._monitor.ended(request.number, self._clock.now_s, output_tokens=request.output_tokens, tpot_s=tpot_s)

    def _memory(self, change: MemoryChange) -> None:
        device = self._fleet.pool.devices[change.device]
        device.others_bytes = min(device.total_bytes, max(0, device.others_bytes + change.num_bytes))
        self._fleet.neighbours_changed(device)

    def _tick(self, now_s: float) -> None:
        fleet = self._fleet
        serving = [each.replica for each in fleet.members if each.state is not MemberState.STARTING]
        queue = len(fleet.gateway) + sum(each.waiting for each in serving)
        running = sum(each.running for each in serving)
        kv_use: Reading = max((each.kv_use for each in serving), default=Absence.NOT_YET, key=_value)
        self._monitor.sampled(now_s, EngineSample(running=running, waiting=queue, kv_use=kv_use))
        observation = self._monitor.observe(now_s)
        changes = fleet.changes
        reason = self._system.tick(observation, now_s)
        if fleet.changes != changes:
            self._monitor.layout_changed(now_s)
        window = observation.window(_CV_WINDOW_S)
        ended, self._since = self._since, []
        self._samples.append(
            Sample(
                at_s=now_s,
                replicas={stages: fleet.stages.count(stages) for stages in sorted(set(fleet.stages))},
                coming=fleet.coming,
                cv=None if isinstance(window.cv, Absence) else window.cv,
                rate_per_s=0.0 if isinstance(window.rate_per_s, Absence) else window.rate_per_s,
                queue=queue,
                running=running,
                ttft_s=fmean(each.first_token_s - each.arrival_s for each in ended) if ended else None,
                latency_s=fmean(each.end_s - each.arrival_s for each in ended) if ended else None,
                devices=fleet.devices_held(),
                reason=reason,
            )
        )

    # --- what came of it ---

    def _told(self) -> Outcome:
        fleet = self._fleet
        times = tuple(_times_of(each) for each in self._requests)
        reserved = fleet.count_reserved()
        devices = [each.devices for each in self._samples if each.at_s <= self._last_s] or [0]
        stalls = stall_lengths(times)
        queues = [each.queue for each in self._samples]
        return Outcome(
            figures=figures(times, self._setting.slo),
            queue_mean=fmean(queues),
            queue_most=max(queues),
            stall_recovery_s=median(stalls) if stalls else None,
            stalls=len(stalls),
            reserved_device_s=reserved.device_s,
            reserved_share_s=reserved.share_s,
            busy_device_s=fleet.busy_total_s(),
            most_devices=reserved.most_devices,
            always_on=min(devices) / max(1, reserved.most_devices),
            changes=fleet.changes,
            changes_per_min=fleet.changes / max(1e-9, self._clock.now_s / 60),
            starts=len(fleet.starts_s),
            mean_start_s=fmean(fleet.starts_s) if fleet.starts_s else None,
            evicted=fleet.evicted,
            events=self._clock.events,
            simulated_s=self._clock.now_s,
            samples=tuple(self._samples),
            requests=times,
        )


def _value(reading: Reading) -> float:
    return -1.0 if isinstance(reading, Absence) else reading


def _times_of(request: SimulatedRequest) -> RequestTimes:
    ended = isfinite(request.end_s)
    return RequestTimes(
        arrival_s=request.arrival_s,
        first_token_s=request.first_token_s if request.first_token_s < inf else None,
        end_s=request.end_s if ended else None,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens if ended else request.done_tokens,
        failure="" if ended else "not ended when the simulation was",
    )


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
