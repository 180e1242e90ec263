"""One simulation: a trace, devices, shapes and a system that decides; what the requests saw and what it took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, inf, isfinite
from statistics import fmean, median

from planner.arrivals import Absence, Reading
from planner.errors import InvalidTrace
from planner.load import WINDOWS_S, EngineSample, LoadMonitor, Observation
from planner.request_figures import RequestTimes, figures
from planner.simulation.clock import Clock
from planner.simulation.fleet import Fleet
from planner.simulation.members import FleetEvents, MemberState
from planner.simulation.outcome import Outcome, Sample, most_in_a_minute, stall_lengths
from planner.simulation.pool import DevicePool, Placing
from planner.simulation.replica import SimulatedRequest
from planner.simulation.shape import Shapes
from planner.simulation.system import System
from planner.traces import TraceRequest
from planner.workload import Slo, Workload
from topology.units import plural

_CV_WINDOW_S = 180.0
_DRAIN_DEADLINE_S = 300.0  # as the daemon has it by default
MOST_LOOKS = 1_000_000  # of whoever decides: two months, one each 5 s; each is kept for the timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChange:
    """Neighbours take or free memory of a device."""

    at_s: float
    device: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything but the system. ``drain_s``: how long after the last arrival requests may still end.

    ``expected``: Requests as they are expected before any has come, which routing goes by. ``windows_s``: over which
    arrivals are watched. ``drain_deadline_s``: what a replica that leaves has not finished by then goes on elsewhere.
    """

    trace: Sequence[TraceRequest]
    shapes: Shapes
    slo: Slo
    expected: Workload
    placing: Placing = Placing.FRAGMENTS
    memory_changes: Sequence[MemoryChange] = ()
    interval_s: float = 5.0
    drain_s: float = 600.0
    drain_deadline_s: float = _DRAIN_DEADLINE_S
    windows_s: Sequence[float] = WINDOWS_S


def simulate(
    setting: Setting,
    pool: DevicePool,
    system: System,
    *,
    on_progress: Callable[[float, float], None] = lambda _now_s, _end_s: None,
) -> Outcome:
    """Run a simulation to its end. ``on_progress`` hears simulated seconds passed, and of how many.

    What it costs follows from what happens: time in which nobody is there and whoever decides rests is jumped over.

    Raises:
        ValueError: The trace is empty.
        InvalidTrace: It would take more than ``MOST_LOOKS`` looks of whoever decides, or has.
    """
    _ensure_bounded(setting)
    return _Run(setting, pool, system, on_progress).outcome()


def _ensure_bounded(setting: Setting) -> None:
    """Refuse what takes too many looks however quick it is: nobody rests while arrivals are in a window."""
    window_s = max(setting.windows_s)
    seen_s = sum(min(window_s, after.arrival_s - before.arrival_s) for before, after in pairwise(setting.trace))
    if seen_s > MOST_LOOKS * setting.interval_s:
        raise InvalidTrace(
            f"{seen_s / 86400:.3g} days with arrivals in them are {seen_s / setting.interval_s:,.0f} looks of "
            f"{setting.interval_s:g} s: at most {MOST_LOOKS:,} are simulated; take a shorter part of it"
        )


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
            FleetEvents(on_first=self._first, on_end=self._ended, on_layout=self._layout_changed),
            placing=setting.placing,
            expected=setting.expected,
            drain_deadline_s=setting.drain_deadline_s,
        )
        self._requests: list[SimulatedRequest] = []
        self._since: list[SimulatedRequest] = []  # ended since the last sample
        self._left = len(setting.trace)
        self._samples: list[Sample] = []
        self._decided_s: list[float] = []  # when something was begun
        self._last_s = setting.trace[-1].arrival_s if setting.trace else 0.0
        self._end_s = self._last_s + setting.drain_s

    def outcome(self) -> Outcome:
        if not self._setting.trace:
            raise ValueError("an empty trace")
        self._system.begin(self._fleet)
        for change in self._setting.memory_changes:
            self._clock.at(change.at_s, lambda change=change: self._memory(change))  # type: ignore[misc]
        self._clock.at(self._setting.trace[0].arrival_s, self._arrive)
        interval_s, number = self._setting.interval_s, 0  # of the look, which is so many intervals from the start
        while self._left and number * interval_s < self._end_s:
            if len(self._samples) == MOST_LOOKS:
                raise InvalidTrace(self._broken_off())
            now_s = (number := number + 1) * interval_s
            self._clock.run(until_s=now_s)
            observation = self._tick(now_s)
            self._on_progress(min(now_s, self._last_s), self._last_s)
            number = max(number, ceil(self._rests_until_s(observation, now_s) / interval_s) - 2)  # the last left out
        return self._told()

    def _rests_until_s(self, observation: Observation, now_s: float) -> float:
        """Return until when no look would find anything, or do anything: one before that is enough."""
        next_s = min(self._clock.next_s, self._end_s)
        if not (observation.is_quiet and self._fleet.is_at_rest) or self._decided_s[-1:] == [now_s]:
            return now_s
        return self._system.rests_until_s(observation, now_s, next_s=next_s)

    def _broken_off(self) -> str:
        waiting = sum(not isfinite(each.end_s) for each in self._requests)
        return (
            f"broken off {self._clock.now_s / 86400:.3g} days into the trace, after {MOST_LOOKS:,} looks: "
            f"{plural(waiting, 'request')} had come and not ended by then; take a shorter part of it"
        )

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

    def _layout_changed(self) -> None:
        self._monitor.layout_changed(self._clock.now_s)

    def _memory(self, change: MemoryChange) -> None:
        device = self._fleet.pool.devices[change.device]
        device.others_bytes = min(device.total_bytes, max(0, device.others_bytes + change.num_bytes))
        self._fleet.neighbours_changed(device)

    def _tick(self, now_s: float) -> Observation:
        fleet = self._fleet
        serving = [each.replica for each in fleet.members if each.state is not MemberState.STARTING]
        queue = len(fleet.gateway) + sum(each.waiting for each in serving)
        running = sum(each.running for each in serving)
        kv_use: Reading = max((each.kv_use for each in serving), default=Absence.NOT_YET, key=_value)
        self._monitor.sampled(now_s, EngineSample(running=running, waiting=queue, kv_use=kv_use))
        observation = self._monitor.observe(now_s)
        begun = fleet.begun
        reason = self._system.tick(observation, now_s)
        if fleet.begun != begun:
            self._decided_s.append(now_s)
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
        return observation

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
            queue_mean=sum(queues) * self._setting.interval_s / max(1e-9, self._clock.now_s),  # none in what was jumped
            queue_most=max(queues),
            stall_recovery_s=median(stalls) if stalls else None,
            stalls=len(stalls),
            reserved_device_s=reserved.device_s,
            reserved_share_s=reserved.share_s,
            busy_device_s=fleet.busy_total_s(),
            most_devices=reserved.most_devices,
            always_on=min(devices) / max(1, reserved.most_devices),
            changes=fleet.changes,
            decisions=len(self._decided_s),
            most_decisions_per_min=most_in_a_minute(self._decided_s),
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
