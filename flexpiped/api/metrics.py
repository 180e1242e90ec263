"""What the API measures, in a registry of its own, and how the engine's counters are shown beside it.

A reading that cannot be had is absent, never zero.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engines.parameters.figures import CacheFigures
from engines.protocol import EngineCounters, StageStatus
from flexpiped.api.engine_metrics import DevicesCollector, ParametersCollector, StagesCollector
from flexpiped.api.exposition import exposition
from flexpiped.api.outcomes import Outcome
from flexpiped.status import Latencies, Percentiles, ServiceState
from topology.device import Device

_REMEMBERED = 1000  # requests whose latencies make the percentiles of the status
_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HANDOVER_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_PHASE_BUCKETS_S = (0.001, 0.005, 0.02, *_HANDOVER_BUCKETS_S)
_PLANNER_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_TPOT_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Endpoint(Enum):
    COMPLETIONS = "completions"
    CHAT = "chat"
    ENGINE = "engine"  # routes that only the engine's own server has


class RequestListener(Protocol):
    """Told of each request that asks for tokens, whoever it is that wants to know. Never waits."""

    def arrived(self, request: object) -> None:
        """It came."""

    def admitted(self, request: object) -> None:
        """It waits no longer: the engine gets it."""

    def first_token(self, request: object) -> None:
        """Its answer has begun."""

    def ended(
        self, request: object, *, prompt_tokens: int | None, output_tokens: int | None, tpot_s: float | None
    ) -> None:
        """It ended, on any path; what is not known of it is None."""


class Observation:
    """One request as it goes. ``outcome`` is what is counted when its scope ends."""

    def __init__(
        self, clock: Callable[[], float], listener: RequestListener | None = None, *, ago_s: float = 0.0
    ) -> None:
        self._clock = clock
        self._listener = listener
        self._is_load = False
        self._began_s = clock() - ago_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self.outcome = Outcome.DISCONNECTED  # until it is known better: what cancellation leaves
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None  # of the prompt, where the engine tells
        self.completion_tokens = 0
        self._timed_tokens = 0

    def asks(self) -> None:
        """Note that the request is one that the engine would serve: it is load, also if it is turned away."""
        self._is_load = True
        if self._listener is not None:
            self._listener.arrived(self)

    def admitted(self) -> None:
        """Note that it waits no longer."""
        if self._listener is not None and self._is_load:
            self._listener.admitted(self)

    def began(self) -> None:
        """Note that the answer has begun, with tokens of which nothing else is known."""
        if self._first_s is None:
            self._note_first(self._clock())

    def tokens(self, completion_tokens: int, *, in_a_row: int | None = None, ago_s: float = 0.0) -> None:
        """Note that there are ``completion_tokens`` by now, ``in_a_row`` in the longest of several choices.

        ``ago_s``: since the last of them came.
        """
        self.completion_tokens = completion_tokens
        self._timed_tokens = completion_tokens if in_a_row is None else in_a_row
        self._last_s = self._clock() - ago_s
        if self._first_s is None:
            self._note_first(self._last_s)

    def end(self) -> None:
        """Note that nothing more will come."""
        if self._listener is not None and self._is_load:
            is_whole = self.outcome is Outcome.DONE
            self._listener.ended(
                self,
                prompt_tokens=self.prompt_tokens or None,
                output_tokens=self.completion_tokens if is_whole and self.completion_tokens else None,
                tpot_s=self.tpot_s,
            )

    def _note_first(self, at_s: float) -> None:
        self._first_s = at_s
        if self._listener is not None and self._is_load:
            self._listener.first_token(self)

    @property
    def ttft_s(self) -> float | None:
        return None if self._first_s is None else self._first_s - self._began_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, None before there are two."""
        if self._first_s is None or self._timed_tokens < 2:
            return None
        return (self._last_s - self._first_s) / (self._timed_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What the daemon reads when it is asked for its metrics."""

    state: ServiceState
    requests_queued: int
    tokens_in_flight: int


class Metrics:
    """Metrics of the API. Used on one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, listener: RequestListener | None = None) -> None:
        self.listener = listener
        self.registry = CollectorRegistry(auto_describe=False)
        self._clock = clock
        self._requests = Counter(
            "flexpiped_requests", "Requests that have ended", ["endpoint", "outcome"], registry=self.registry
        )
        self._in_flight = Gauge("flexpiped_requests_in_flight", "Requests being answered", registry=self.registry)
        self._prompt_tokens = Counter(
            "flexpiped_request_prompt_tokens", "Prompt tokens of requests that have ended", registry=self.registry
        )
        self._completion_tokens = Counter(
            "flexpiped_request_completion_tokens", "Output tokens of requests that have ended", registry=self.registry
        )
        self._ttft = Histogram(
            "flexpiped_time_to_first_token_seconds",
            "From the request's arrival to its first output token",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "flexpiped_time_per_output_token_seconds",
            "Mean time between the output tokens of a request",
            buckets=_TPOT_BUCKETS_S,
            registry=self.registry,
        )
        self._handovers = Counter(
            "flexpiped_handovers", "Changes of layout that have ended", ["result"], registry=self.registry
        )
        self._handover_s = Histogram(
            "flexpiped_handover_duration_seconds",
            "From the beginning of a change of layout to its end",
            buckets=_HANDOVER_BUCKETS_S,
            registry=self.registry,
        )
        self._phase_s = Histogram(
            "flexpiped_handover_phase_seconds",
            "What each phase of a change of layout took",
            ["phase"],
            buckets=_PHASE_BUCKETS_S,
            registry=self.registry,
        )
        self._pause_s = Histogram(
            "flexpiped_handover_commit_pause_seconds",
            "From the last step in one layout to the first in the next",
            buckets=_TPOT_BUCKETS_S,
            registry=self.registry,
        )
        self._decisions = Counter(
            "flexpiped_decisions", "Decisions of automatic control", ["verb"], registry=self.registry
        )
        self._planner_s = Histogram(
            "flexpiped_planner_duration_seconds",
            "From a question to the planner to its answer",
            buckets=_PLANNER_BUCKETS_S,
            registry=self.registry,
        )
        self._recent_ttft_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._recent_tpot_s: deque[float] = deque(maxlen=_REMEMBERED)

    @contextmanager
    def observe(self, endpoint: Endpoint, *, ago_s: float = 0.0) -> Iterator[Observation]:
        """Count one request, which came ``ago_s`` ago; leaving the scope on any path records it."""
        observation = Observation(self._clock, self.listener, ago_s=ago_s)
        self._in_flight.inc()
        try:
            yield observation
        finally:
            self._in_flight.dec()
            observation.end()
            self._record(endpoint, observation)

    def handover_ended(self, record: Mapping[str, Any]) -> None:
        """Count a change of layout by its record, as ``record_to_wire`` gives it."""
        self._handovers.labels(record["result"]).inc()
        self._handover_s.observe(record["duration_s"])
        for phase, took_s in record["phases_s"].items():
            self._phase_s.labels(phase.replace(" ", "_")).observe(took_s)
        pause_s = (record["progress"] or {}).get("commit_pause_s")
        if pause_s is not None:
            self._pause_s.observe(pause_s)

    def latencies(self) -> Latencies:
        """Return percentiles over the last requests."""
        return Latencies(ttft=percentiles_of(self._recent_ttft_s), tpot=percentiles_of(self._recent_tpot_s))

    def decided(self, verb: str) -> None:
        """Count a decision of automatic control, also one to keep everything as it is."""
        self._decisions.labels(verb).inc()

    def planned(self, took_s: float) -> None:
        """Count a plan, whoever asked for it. May be called from any thread."""
        self._planner_s.observe(took_s)

    def render(
        self,
        counters: EngineCounters | None,
        levels: Levels | None = None,
        *,
        stages: Sequence[StageStatus] = (),
        devices: Sequence[Device] = (),
        parameters: CacheFigures | None = None,
        processes: Iterable[Metric] = (),
    ) -> bytes:
        """Return the exposition in Prometheus's text format, with the engine's counters where they can be had."""
        of_daemon = daemon_families(levels, devices=devices, parameters=parameters, processes=processes)
        return exposition(self.families(counters, stages=stages), of_daemon)

    def families(
        self, counters: EngineCounters | None, *, stages: Sequence[StageStatus] = ()
    ) -> tuple[Iterable[Metric], ...]:
        """Return what is told of one model."""
        engine = [] if counters is None else [_EngineCollector(counters).collect()]
        return (self.registry.collect(), *engine, *([StagesCollector(stages).collect()] if stages else ()))

    def _record(self, endpoint: Endpoint, observation: Observation) -> None:
        self._requests.labels(endpoint.value, observation.outcome.value).inc()
        self._prompt_tokens.inc(observation.prompt_tokens)
        self._completion_tokens.inc(observation.completion_tokens)
        if observation.ttft_s is not None:
            self._ttft.observe(observation.ttft_s)
            self._recent_ttft_s.append(observation.ttft_s)
        if observation.tpot_s is not None:
            self._tpot.observe(observation.tpot_s)
            self._recent_tpot_s.append(observation.tpot_s)


def daemon_families(
    levels: Levels | None,
    *,
    devices: Sequence[Device] = (),
    parameters: CacheFigures | None = None,
    processes: Iterable[Metric] = (),
) -> tuple[Iterable[Metric], ...]:
    """Return what is told of the daemon as a whole."""
    found: list[Iterable[Metric]] = [processes]
    found += [] if levels is None else [_LevelsCollector(levels).collect()]
    found += [DevicesCollector(devices).collect()] if devices else []
    return (*found, *([] if parameters is None else [ParametersCollector(parameters).collect()]))


def model_states(states: Mapping[str, ServiceState]) -> tuple[Iterable[Metric], ...]:
    """Return the state of each of several models."""
    family = GaugeMetricFamily(
        "flexpiped_model_state", "1 for the state of a model, 0 for others", labels=["model", "state"]
    )
    for name, now in states.items():
        for state in ServiceState:
            family.add_metric([name, state.value], float(state is now))
    return ([family],)


class _LevelsCollector(Collector):
    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    def collect(self) -> Iterator[Metric]:
        now = self._levels
        yield GaugeMetricFamily(
            "flexpiped_requests_queued", "Requests that wait for a place", value=now.requests_queued
        )
        yield GaugeMetricFamily("flexpiped_tokens_in_flight", "Tokens reserved by requests", value=now.tokens_in_flight)
        states = GaugeMetricFamily("flexpiped_state", "1 for the state of the service, 0 for others", labels=["state"])
        for state in ServiceState:
            states.add_metric([state.value], float(state is now.state))
        yield states


class _EngineCollector(Collector):
    def __init__(self, counters: EngineCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        now = self._counters
        for name, text, reading in (
            ("running_requests", "Requests that get tokens", now.running),
            ("waiting_requests", "Requests that wait for a place", now.waiting),
            ("kv_blocks_used", "KV blocks in use", now.kv_blocks_used),
            ("kv_blocks_capacity", "KV blocks there are", now.kv_blocks_capacity),
            ("kv_block_tokens", "Token slots of a KV block", now.kv_block_tokens),
            ("kv_blocks_cached", "KV blocks kept for prompts to come, in nobody's use", now.kv_blocks_cached),
        ):
            if reading is not None:
                yield GaugeMetricFamily(f"flexpiped_engine_{name}", text, value=reading)
        for name, text, total in (
            ("prompt_tokens", "Prompt tokens taken in since the engine started", now.prompt_tokens_total),
            ("generated_tokens", "Tokens generated since the engine started", now.generated_tokens_total),
            ("preemptions", "Requests put back for want of KV blocks", now.preemptions_total),
            ("steps", "Steps of the engine", now.steps_total),
            ("worker_restarts", "Stage workers started again", now.worker_restarts_total),
            ("refactorings", "Changes of layout carried out", now.refactorings_total),
            ("prefix_queried_tokens", "Tokens looked for in the prefix cache", now.prefix_queried_tokens_total),
            ("prefix_hit_tokens", "Tokens found in the prefix cache", now.prefix_hit_tokens_total),
        ):
            if total is not None:
                yield CounterMetricFamily(f"flexpiped_engine_{name}", text, value=total)


def percentiles_of(values_s: Sequence[float] | deque[float]) -> Percentiles | None:
    """Return median and 99th percentile (nearest rank), None of nothing."""
    if not values_s:
        return None
    ordered = sorted(values_s)
    return Percentiles(p50_s=_rank(ordered, 0.5), p99_s=_rank(ordered, 0.99))


def _rank(ordered: list[float], share: float) -> float:
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
