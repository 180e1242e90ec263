"""The policy's candidates for what serves now: planned once for each layout, predicted once for each kind of load."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from engines.protocol import Engine
from flexpiped.config_values import Auto
from planner.arrivals import Absence
from planner.candidate_plan import PlanAnswer
from planner.granularity import Candidate
from planner.layout import Pipeline
from planner.load import Observation
from planner.policy_candidates import Granularity, candidates_for, granularities_of, similar
from planner.policy_state import known
from planner.start_times import ExpectedStart
from planner.workload import Slo, Workload
from topology.device import Device

_Asked = tuple[str, Pipeline, tuple[Pipeline, ...]]  # engine, main pipeline, all pipelines
PLAN_AGE_S: Final = 300.0  # then devices may have other neighbours
_KEPT: Final = 32  # kinds of load


class Answers(Protocol):
    """Plans for a number of stages; may take a while, and is called in a thread."""

    def answer(
        self,
        stages: int | Auto,
        *,
        current: Pipeline | None,
        resident: Sequence[tuple[str, ...]] = (),
        taken: frozenset[str] = frozenset(),
    ) -> PlanAnswer:
        """Return the whole plan on devices that are not ``taken``, with every candidate. Raises ``PlannerError``."""

    def devices(self) -> Sequence[Device]:
        """Return the devices as they are now."""


class PlannedCandidates:
    """Candidates from the planner.

    Args:
        resolver: That of the engine in force.
        serving: The pipelines of all replicas; empty: there is only the one that is asked about.
        expected: The workload that the configuration expects: it counts as long as nothing has been seen.
        start: What a replica of so many stages would take to start; None: no start was measured. Called in a thread.
    """

    def __init__(
        self,
        *,
        resolver: Callable[[], Answers],
        expected: Workload,
        slo: Slo,
        serving: Callable[[], Sequence[Pipeline]] = tuple,
        start: Callable[[int], ExpectedStart | None] = lambda _num_stages: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = serving
        self._start = start
        self._resolver = resolver
        self._expected = expected
        self._slo = slo
        self._clock = clock
        self._planned: tuple[_Asked, float, tuple[Granularity, ...]] | None = None
        self._known: dict[Workload, tuple[Candidate, ...]] = {}

    def expect(self, expected: Workload, slo: Slo) -> None:
        """Go on with another workload and other targets; predictions that rest on the old ones are forgotten."""
        self._expected, self._slo = expected, slo
        self._known.clear()

    async def of(self, engine: Engine, seen: Observation) -> tuple[Candidate, ...]:
        """Return the candidates for ``engine`` under a load such as ``seen``.

        Raises:
            PlannerError, EngineError
        """
        granularities = await self._granularities(engine)
        workload = similar(workload_seen(seen, self._expected))
        if workload not in self._known:
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[workload] = await asyncio.to_thread(candidates_for, granularities, workload, self._slo)
        return self._known[workload]

    async def starting_now(self, found: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Return candidates with what a start would take now: parameters may have left the memory of the host."""
        starts = await asyncio.to_thread(lambda: [self._start(each.num_stages) for each in found])
        return tuple(
            each if start is None else replace(each, start_s=start.took_s, start_in_words=start.in_words)
            for each, start in zip(found, starts, strict=True)
        )

    async def _granularities(self, engine: Engine) -> tuple[Granularity, ...]:
        asked, now_s = (engine.capabilities.name, engine.pipeline, tuple(self._serving())), self._clock()
        if self._planned is None or self._planned[0] != asked or now_s - self._planned[1] > PLAN_AGE_S:
            taken = devices_beside(engine.pipeline, self._serving())
            planned, free = await asyncio.to_thread(self._plan, engine, taken)
            found = tuple(
                replace(
                    each,
                    most_replicas=most_replicas(each, serving=self._serving(), free_devices=free),
                    room=room_for(each, free_devices=free),
                )
                for each in planned
            )
            self._planned = (asked, now_s, found)
            self._known.clear()
        return self._planned[2]

    def _plan(self, engine: Engine, taken: frozenset[str]) -> tuple[tuple[Granularity, ...], int]:
        """Return what is planned for the main replica, and how many devices no replica has."""
        resolver, current = self._resolver(), engine.pipeline
        answer = resolver.answer(Auto.AUTO, current=current, resident=engine.capabilities.resident, taken=taken)
        devices, held = resolver.devices(), taken | set(current.device_ids)
        shared = frozenset(each.id for each in devices if each.is_shared)
        planned = tuple(self._with_start(each) for each in granularities_of(answer, shared=shared))
        return planned, sum(each.id not in held for each in devices)

    def _with_start(self, found: Granularity) -> Granularity:
        start = self._start(found.num_stages)
        return found if start is None else replace(found, start_s=start.took_s, start_in_words=start.in_words)


def devices_beside(main: Pipeline, serving: Sequence[Pipeline]) -> frozenset[str]:
    """Return the devices of all pipelines but the main one."""
    return frozenset(device for each in serving if each != main for device in each.device_ids)


def most_replicas(granularity: Granularity, *, serving: Sequence[Pipeline], free_devices: int) -> int:
    """Return how many replicas there could be with further ones of this granularity: each has devices of its own.

    Whether the free devices have the memory is for the plan of each that comes; one that does not fit is refused.
    """
    return max(1, len(serving)) + room_for(granularity, free_devices=free_devices)


def room_for(granularity: Granularity, *, free_devices: int) -> int:
    """Return how many further replicas of this granularity find devices."""
    return free_devices // max(1, granularity.devices)


def workload_seen(seen: Observation, expected: Workload) -> Workload:
    """Return the workload that is observed; what was not seen is as expected."""
    rates = [window.rate_per_s for window in seen.windows if not isinstance(window.rate_per_s, Absence)]
    return Workload(
        rate_per_s=max([rate for rate in rates if rate > 0], default=expected.rate_per_s),
        cv=expected.cv,
        prompt_tokens_mean=max(1.0, known(seen.prompt_tokens_mean, expected.prompt_tokens_mean)),
        output_tokens_mean=max(1.0, known(seen.output_tokens_mean, expected.output_tokens_mean)),
    )
