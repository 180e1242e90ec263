"""A policy run through virtual time: arrivals in, decisions out, every action carried out as asked."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from math import inf

from planner.granularity import Candidate
from planner.load import EngineSample, LoadMonitor
from planner.policy import decide, initial_state, settle
from planner.policy_state import Action, Decision, Ending, PolicyConstants, PolicyState
from planner.prediction import Prediction
from planner.simulation.outcome import most_in_a_minute
from planner.workload import Slo

OUTPUT_TOKENS = 32


def prediction(latency_s: float, *, load: float) -> Prediction:
    """Return a prediction of which only load and latency matter: all of it is time to the first token."""
    return Prediction(
        ttft_s=latency_s if load < 1 else inf,
        ttft_p99_s=latency_s,
        tpot_s=0.0,
        batch=1,
        max_batch=64,
        throughput_tokens_per_s=0.0,
        capacity_per_s=1.0,
        capacity_tokens_per_s=1.0,
        load=load,
        goodput_per_s=0.0,
        attainment=1.0,
    )


def candidate(
    num_stages: int, *, throughput_per_s: float, latency_s: float, best_cv: float, **more: float
) -> Candidate:
    """Return a candidate whose latency grows with its load, and with the distance from its best CV."""

    def outlook(rate_per_s: float, cv: float) -> Prediction:
        load = rate_per_s / throughput_per_s
        wait_s = latency_s * (1 + abs(cv - best_cv) / 4) / max(1e-6, 1 - load)
        return prediction(wait_s, load=load)

    made = Candidate(
        num_stages=num_stages,
        throughput_per_s=throughput_per_s,
        latency_s=latency_s,
        best_cv=best_cv,
        change_s=0.05,
        outlook=outlook,
    )
    return replace(made, **more)  # type: ignore[arg-type]


TWO = candidate(2, throughput_per_s=10.0, latency_s=0.2, best_cv=0.5)
FOUR = candidate(4, throughput_per_s=18.0, latency_s=0.25, best_cv=3.0)
EIGHT = candidate(8, throughput_per_s=24.0, latency_s=0.4, best_cv=6.0)
THREE = (TWO, FOUR, EIGHT)


@dataclass(slots=True)
class Run:
    """What happened: every decision, and when each action began.

    ``latency_s``: what requests are measured to take with so many stages; None: nothing is measured. ``ending``: how
    actions end. ``queue``: what the engine says that it has, always or at a time.
    """

    constants: PolicyConstants
    candidates: tuple[Candidate, ...] = THREE
    fleet: tuple[int, ...] = (2,)
    latency_s: Callable[[int], float] | None = None
    queue: int | Callable[[float], int] = 0
    slo: Slo = field(default_factory=Slo)
    action_s: float = 0.5
    ending: Callable[[Action], Ending] = lambda _action: Ending.DONE
    decisions: list[Decision] = field(default_factory=list)
    actions: list[tuple[float, Action]] = field(default_factory=list)

    def through(self, arrivals_s: Iterable[float], *, until_s: float, interval_s: float = 5.0) -> PolicyState:
        """Run until ``until_s`` and return the last state."""
        monitor, state = LoadMonitor(began_s=0.0, slo=self.slo), initial_state(self.fleet, now_s=0.0)
        coming, number, due = iter(arrivals_s), 0, None
        waiting: list[int] = []  # for a replica that wakes
        next_s = next(coming, inf)
        for cycle in range(1, int(until_s / interval_s) + 1):
            now_s = cycle * interval_s
            while next_s <= now_s:
                number += 1
                monitor.arrived(number, next_s)
                if state.main is None:
                    waiting.append(number)
                else:
                    self._serve(monitor, number, next_s, state.main)
                next_s = next(coming, inf)
            monitor.sampled(now_s, EngineSample(running=0, waiting=self._waiting(now_s), kv_use=0.1))
            if due is not None and now_s >= due[0]:
                ending = self.ending(due[1])
                after = due[1].on(state.fleet) if ending is Ending.DONE else state.fleet
                state = settle(state, now_s=due[0], fleet=after, ending=ending, constants=self.constants)
                if ending is Ending.DONE:
                    monitor.layout_changed(due[0])
                while waiting and state.main is not None:
                    self._serve(monitor, waiting.pop(0), due[0], state.main)
                due = None
            state, decision = decide(state, monitor.observe(now_s), self.candidates, now_s, self.constants)
            self.decisions.append(decision)
            if decision.action is not None:
                self.actions.append((now_s, decision.action))
                due = (now_s + self.action_s, decision.action)
        return state

    def _waiting(self, now_s: float) -> int:
        return self.queue if isinstance(self.queue, int) else self.queue(now_s)

    def _serve(self, monitor: LoadMonitor, number: int, at_s: float, num_stages: int) -> None:
        if self.latency_s is None:
            monitor.ended(number, at_s)
            return
        monitor.first_token(number, at_s + self.latency_s(num_stages))
        monitor.ended(number, at_s + self.latency_s(num_stages), output_tokens=1)

    @property
    def most_in_a_minute(self) -> int:
        """The most actions that began within any 60 s."""
        return most_in_a_minute([at_s for at_s, _action in self.actions])

    def beyond(self, most: int) -> list[Decision]:
        """Return the decisions to act although ``most`` actions had begun within the 60 s before."""
        acted = [each for each in self.decisions if each.action is not None]
        times_s = [each.at_s for each in acted]
        return [each for each in acted if sum(each.at_s - 60 < at_s < each.at_s for at_s in times_s) >= most]


def steady(rate_per_s: float, until_s: float) -> Iterator[float]:
    """Yield evenly spaced arrivals."""
    now_s = 0.0
    while now_s < until_s:
        now_s += 1 / rate_per_s
        yield now_s


def bursts(rate_per_s: float, until_s: float, *, size: int) -> Iterator[float]:
    """Yield ``size`` arrivals at once, so many times that the mean rate is kept: a CV of about sqrt(2 size - 1)."""
    now_s = 0.0
    while now_s < until_s:
        now_s += size / rate_per_s
        for index in range(size):
            yield now_s + index * 1e-3


def square_wave(*, low_per_s: float, high_per_s: float, period_s: float, until_s: float) -> Iterable[float]:
    """Yield arrivals at one rate for half a period, then at the other."""
    now_s = 0.0
    while now_s < until_s:
        rate = high_per_s if now_s % period_s >= period_s / 2 else low_per_s
        now_s += 1 / rate
        yield now_s
