"""What the daemon is doing, gathered for ``GET /status`` of the admin API. A value that cannot be had is None."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol

import flexpiped
from engines.errors import EngineError
from engines.parameters.figures import CacheFigures
from engines.process import memory_pss_bytes
from engines.protocol import Engine, EngineCounters, StageStatus
from flexpiped.handover_records import record_to_wire
from flexpiped.refactoring import Refactorings
from flexpiped.throughput import TokenRate
from flexpiped.total_counters import total_counters
from planner.arrivals import ArrivalStatistics, reading_to_wire

SAMPLE_PERIOD_S = 1.0


class ServiceState(Enum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"  # the engine died and is being started again
    ASLEEP = "asleep"  # there is no engine; the next request starts it, and waits
    DRAINING = "draining"
    FAILED = "failed"
    STOPPED = "stopped"  # by hand: no request is taken until it is started again


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The state of the service, with the reason in words."""

    state: ServiceState
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What does not change while the daemon runs."""

    model_name: str
    model_path: str
    api_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Median and 99th percentile of a duration, over the requests that the API remembers."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Time to first token and time per output token, None before there is a request."""

    ttft: Percentiles | None
    tpot: Percentiles | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica. ``engine`` None: it does not serve now, and ``reason`` says why."""

    number: int
    state: str
    reason: str
    requests: int
    engine: Engine | None


class StatusSource(Protocol):
    """Gives the status as JSON values."""

    async def status(self) -> dict[str, Any]: ...


class DaemonStatus:
    """Reads the engine and the parts of the daemon. ``sample_forever`` feeds the token rate and runs beside it.

    Args:
        engine_name: Of the kind in force, which a handover may change.
        engine: The main one of now; raises ``EngineError`` while there is none.
        fleet: Every replica; without it there is that engine only.
        latencies: None while nothing measures them.
        auto: Mode and last decision of automatic control; None before there is any.
        parameters: What stays in host memory of layers; None where nothing is to.
        arrivals: Of the load monitor's windows, the shortest first; none where nobody counts.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        engine_name: Callable[[], str],
        health: Callable[[], Health],
        engine: Callable[[], Engine],
        refactorings: Refactorings,
        latencies: Callable[[], Latencies | None],
        auto: Callable[[], Mapping[str, Any] | None] = lambda: None,
        fleet: Callable[[], Sequence[ReplicaStatus]] = tuple,
        parameters: Callable[[], CacheFigures | None] = lambda: None,
        arrivals: Callable[[], Sequence[ArrivalStatistics]] = tuple,
        monotonic_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._engine_name = engine_name
        self._health = health
        self._engine = engine
        self._refactorings = refactorings
        self._latencies = latencies
        self._auto = auto
        self._fleet = fleet
        self._parameters = parameters
        self._arrivals = arrivals
        self._monotonic_clock = monotonic_clock
        self._started_s = monotonic_clock()
        self._rate = TokenRate()

    @property
    def tokens_per_s(self) -> float | None:
        """What all engines generate now; None while that is not known."""
        return self._rate.tokens_per_s

    async def sample_forever(self) -> None:
        """Read the engine's token counter once a second."""
        while True:
            await self.sample()
            await asyncio.sleep(SAMPLE_PERIOD_S)

    async def sample(self) -> None:
        """Read the engine's token counter."""
        counters = await self._counters()
        if counters is None:
            self._rate.clear()
        else:
            self._rate.add(self._monotonic_clock(), counters.generated_tokens_total)

    async def _counters(self) -> EngineCounters | None:
        """Return those of all engines together."""
        fleet = [each.engine for each in self._fleet() if each.engine is not None]
        try:
            return await total_counters(fleet or [self._engine()])
        except EngineError:
            return None

    async def status(self) -> dict[str, Any]:
        """Return everything ``flexctl status`` shows: stages and epoch of the main replica, counters of all."""
        main: Engine | None = None
        with suppress(EngineError):  # starting, or between two engines: the state says which
            main = self._engine()
        fleet = self._fleet()
        wires = [await replica_to_wire(each) for each in fleet]
        of_main = next((wire for each, wire in zip(fleet, wires, strict=True) if each.engine is main), None)
        shown = of_main if of_main is not None and main is not None else await engine_to_wire(main)
        counters = await self._counters()
        return self._overview() | {
            "epoch": shown["epoch"],
            "stages": shown["stages"],
            "engine_counters": None if counters is None else counters_to_wire(counters),
            "tokens_per_s": self._rate.tokens_per_s,
            "replicas": wires,
        }

    def _overview(self) -> dict[str, Any]:
        health, latencies, history = self._health(), self._latencies(), self._refactorings.history
        parameters = self._parameters()
        return {
            "version": flexpiped.__version__,
            "model": {"name": self._identity.model_name, "path": self._identity.model_path},
            "engine": self._engine_name(),
            "api_url": self._identity.api_url,
            "uptime_s": self._monotonic_clock() - self._started_s,
            "state": health.state.value,
            "reason": health.reason,
            "ttft": _percentiles_to_wire(latencies.ttft if latencies else None),
            "tpot": _percentiles_to_wire(latencies.tpot if latencies else None),
            "arrivals": arrivals_to_wire(self._arrivals()),
            "under_way": self._refactorings.under_way,
            "auto": self._auto(),
            "parameter_cache": None if parameters is None else asdict(parameters),
            "last_handover": record_to_wire(history[-1]) if history else None,
        }


async def replica_to_wire(replica: ReplicaStatus) -> dict[str, Any]:
    """Return a replica as JSON values."""
    return {
        "number": replica.number,
        "state": replica.state,
        "reason": replica.reason,
        "requests": replica.requests,
        **await engine_to_wire(replica.engine),
    }


async def engine_to_wire(engine: Engine | None) -> dict[str, Any]:
    """Return what runs in an engine; None and nothing where there is none, or it ends right now."""
    counters: EngineCounters | None = None
    stages: Sequence[StageStatus] = ()
    epoch: int | None = None
    if engine is not None:
        with suppress(EngineError):
            counters, stages, epoch = await engine.counters(), await engine.stages(), engine.epoch
    return {
        "epoch": epoch,
        "stages": await asyncio.to_thread(stages_to_wire, stages),
        "engine_counters": None if counters is None else counters_to_wire(counters),
    }


def stages_to_wire(stages: Sequence[StageStatus]) -> list[dict[str, Any]]:
    """Return the stages with the memory of their processes. Reads /proc, which may block for milliseconds."""
    return [
        {
            "index": stage.index,
            "device_ids": list(stage.device_ids),
            "first_decoder": stage.first_decoder,
            "end_decoder": stage.end_decoder,
            "weights_bytes": stage.weights_bytes,
            "kv_mapped_bytes": stage.kv_mapped_bytes,
            "busy": stage.busy,
            "runs": stage.runs,
            "workers": [{"pid": pid, "pss_bytes": memory_pss_bytes(pid)} for pid in stage.pids],
        }
        for stage in stages
    ]


def arrivals_to_wire(windows: Sequence[ArrivalStatistics]) -> list[dict[str, float | str]]:
    """Return rate and CV of each window; one that is missing is the reason in words, as in decisions."""
    return [
        {
            "window_s": window.window_s,
            "requests_per_s": reading_to_wire(window.rate_per_s),
            "cv": reading_to_wire(window.cv),
        }
        for window in windows
    ]


def counters_to_wire(counters: EngineCounters) -> dict[str, int | None]:
    """Return the engine's counters as JSON values, under the names they have in the protocol."""
    return {name: getattr(counters, name) for name in EngineCounters.__dataclass_fields__}


def _percentiles_to_wire(percentiles: Percentiles | None) -> dict[str, float] | None:
    return None if percentiles is None else {"p50_s": percentiles.p50_s, "p99_s": percentiles.p99_s}
