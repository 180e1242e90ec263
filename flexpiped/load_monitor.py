"""Tells the planner's load monitor what happens: requests as the API sees them, and what the engine says when asked."""

import time
from collections.abc import Callable, Sequence

from engines.errors import EngineError
from engines.protocol import Engine, EngineCounters, StageStatus
from planner.arrivals import Absence, Reading
from planner.load import WINDOWS_S, EngineSample, LoadMonitor, Observation
from planner.workload import Slo
from topology.device import Device

_NO_TARGETS = Slo()


class LoadSampler:
    """A ``RequestListener`` of the API's metrics. Used on one event loop."""

    def __init__(
        self,
        *,
        windows_s: Sequence[float] = WINDOWS_S,
        memory_s: float = 60.0,
        stale_after_s: float = 15.0,
        slo: Slo = _NO_TARGETS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._monitor = LoadMonitor(
            began_s=clock(), windows_s=windows_s, memory_s=memory_s, stale_after_s=stale_after_s, slo=slo
        )

    def expect(self, slo: Slo) -> None:
        """Go on with other targets."""
        self._monitor.slo = slo

    def arrived(self, request: object) -> None:
        """A request came."""
        self._monitor.arrived(request, self._clock())

    def admitted(self, request: object) -> None:
        """Nothing that the policy looks at."""

    def first_token(self, request: object) -> None:
        """Its answer has begun."""
        self._monitor.first_token(request, self._clock())

    def ended(
        self, request: object, *, prompt_tokens: int | None, output_tokens: int | None, tpot_s: float | None
    ) -> None:
        """It ended, on any path."""
        now_s = self._clock()
        if prompt_tokens is not None:
            self._monitor.prompt_known(now_s, prompt_tokens)
        self._monitor.ended(request, now_s, output_tokens=output_tokens, tpot_s=tpot_s)

    def layout_changed(self) -> None:
        """Another layout is in force: latencies of requests that come from here on are its own."""
        self._monitor.layout_changed(self._clock())

    def devices_seen(self, devices: Sequence[Device]) -> None:
        """Somebody has looked at the devices."""
        self._monitor.devices_seen(self._clock(), {each.id: each.memory_others_bytes for each in devices})

    async def sample(self, *engines: Engine) -> None:
        """Ask the engines of all replicas. One that is gone says nothing, and what was said last becomes stale."""
        try:
            counters = [await engine.counters() for engine in engines]
            stages = [stage for engine in engines for stage in await engine.stages()]
        except EngineError:
            return
        if counters:
            self._monitor.sampled(self._clock(), sample_of(counters, stages))

    def observe(self) -> Observation:
        """Return what is known now."""
        return self._monitor.observe(self._clock())


def sample_of(counters: Sequence[EngineCounters], stages: Sequence[StageStatus]) -> EngineSample:
    """Return counters of each engine, and the stages of all, in the planner's words."""
    kv_uses = [each.kv_blocks_used / each.kv_blocks_capacity for each in counters if each.kv_blocks_capacity]
    return EngineSample(
        running=sum(each.running for each in counters),
        waiting=sum(each.waiting for each in counters),
        kv_use=max(kv_uses, default=Absence.UNSUPPORTED),
        stage_busy=tuple(_busy(stage) for stage in stages),
    )


def _busy(stage: StageStatus) -> Reading:
    return Absence.NOT_YET if stage.busy is None else stage.busy
