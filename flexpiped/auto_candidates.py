"""The policy's candidates for what serves now: planned once for each layout, predicted once for each kind of load.

Others take and free the devices meanwhile: for how many further replicas there is room is counted anew at each look,
and where much of a device has changed hands, it is planned again.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from typing import Final, Protocol

from engines.protocol import Engine
from flexpiped.config_values import Auto
from planner.arrivals import Absence
from planner.candidate_plan import PlanAnswer
from planner.errors import PlannerError
from planner.granularity import Candidate
from planner.layout import Pipeline
from planner.load import Observation
from planner.policy_candidates import Granularity, candidates_for, granularities_of, similar
from planner.policy_state import known
from planner.start_times import ExpectedStart
from planner.workload import Slo, Workload
from topology.device import Device

_Asked = tuple[str, Pipeline, tuple[Pipeline, ...]]  # engine, main pipeline, all pipelines
PLAN_AGE_S: Final = 300.0
CHANGED_AGE_S: Final = 30.0  # from then on another plan is made where others hold much more or less of a device
_MUCH: Final = 1 / 16  # of its memory
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What was planned, when and for what, and the devices as they were then."""

    asked: _Asked
    at_s: float
    found: tuple[Granularity, ...]
    devices: tuple[Device, ...]

    def has_changed(self, taken: Mapping[str, int]) -> bool:
        """Whether others hold much more, or less, of a device than when this was planned."""
        return any(
            abs(taken.get(each.id, each.memory_others_bytes) - each.memory_others_bytes)
            > _MUCH * each.memory_total_bytes
            for each in self.devices
        )

    def free_bytes(self, taken: Mapping[str, int], *, held: frozenset[str]) -> tuple[int, ...]:
        """Return what is free of each device that no replica has, where others hold so much now."""
        return tuple(
            each.memory_usable_bytes + each.memory_others_bytes - taken.get(each.id, each.memory_others_bytes)
            for each in self.devices
            if each.id not in held
        )


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
        self._planned: _Planned | None = None
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
        taken = {} if isinstance(seen.taken_bytes, Absence) else seen.taken_bytes
        planned = await self._plan_of(engine, taken)
        workload = similar(workload_seen(seen, self._expected))
        if workload not in self._known:
            while len(self._known) >= _KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[workload] = await asyncio.to_thread(candidates_for, planned.found, workload, self._slo)
        self._known[workload] = self._with_room(self._known[workload], planned, taken)
        return self._known[workload]

    async def starting_now(self, found: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Return candidates with what a start would take now: parameters may have left the memory of the host."""
        starts = await asyncio.to_thread(lambda: [self._start(each.num_stages) for each in found])
        return tuple(
            each if start is None else replace(each, start_s=start.took_s, start_in_words=start.in_words)
            for each, start in zip(found, starts, strict=True)
        )

    async def _plan_of(self, engine: Engine, taken: Mapping[str, int]) -> _Planned:
        asked, now_s = (engine.capabilities.name, engine.pipeline, tuple(self._serving())), self._clock()
        planned = self._planned
        age_s = inf if planned is None or planned.asked != asked else now_s - planned.at_s
        if planned is None or age_s > PLAN_AGE_S or (age_s > CHANGED_AGE_S and planned.has_changed(taken)):
            found, devices = await asyncio.to_thread(self._plan, engine, asked[2])
            planned = self._planned = _Planned(asked=asked, at_s=now_s, found=found, devices=devices)
            self._known.clear()
        return planned

    def _plan(self, engine: Engine, serving: Sequence[Pipeline]) -> tuple[tuple[Granularity, ...], tuple[Device, ...]]:
        """Return what is planned for the main replica, with what others have that it could not; and the devices."""
        resolver, main = self._resolver(), engine.pipeline
        resident, taken = engine.capabilities.resident, devices_beside(main, serving)
        answer = resolver.answer(Auto.AUTO, current=main, resident=resident, taken=taken)
        devices = tuple(resolver.devices())
        shared = frozenset(each.id for each in devices if each.is_shared)
        found = {each.num_stages: each for each in granularities_of(answer, shared=shared)}
        for other in serving:
            if other.granularity not in found:
                with suppress(PlannerError):  # what serves and cannot be planned stays unknown
                    beside = devices_beside(other, serving)
                    answer = resolver.answer(other.granularity, current=other, taken=beside)
                    found |= {each.num_stages: each for each in granularities_of(answer, shared=shared)}
        return tuple(self._with_start(found[count]) for count in sorted(found)), devices

    def _with_room(
        self, known: tuple[Candidate, ...], planned: _Planned, taken: Mapping[str, int]
    ) -> tuple[Candidate, ...]:
        """Return candidates with the further replicas for which there is room now; the same ones where that is so."""
        _, main, serving = planned.asked
        held = frozenset(device for each in (main, *serving) for device in each.device_ids)
        free = planned.free_bytes(taken, held=held)
        rooms = {each.num_stages: room_for(each, free_bytes=free) for each in planned.found}
        if all(each.room == rooms[each.num_stages] for each in known):
            return known
        have = max(1, len(serving))
        return tuple(
            replace(each, room=rooms[each.num_stages], most_replicas=have + rooms[each.num_stages]) for each in known
        )

    def _with_start(self, found: Granularity) -> Granularity:
        start = self._start(found.num_stages)
        return found if start is None else replace(found, start_s=start.took_s, start_in_words=start.in_words)


def devices_beside(main: Pipeline, serving: Sequence[Pipeline]) -> frozenset[str]:
    """Return the devices of all pipelines but the main one."""
    return frozenset(device for each in serving if each != main for device in each.device_ids)


def room_for(granularity: Granularity, *, free_bytes: Sequence[int]) -> int:
    """Return how many further replicas of this granularity find devices of their own with the memory for a stage.

    Their own plan may find another cut for what is left; what does not fit is refused there.
    """
    fitting = sum(each >= granularity.stage_bytes for each in free_bytes)
    return fitting // max(1, granularity.devices)


def workload_seen(seen: Observation, expected: Workload) -> Workload:
    """Return the workload that is observed; what was not seen is as expected."""
    rates = [window.rate_per_s for window in seen.windows if not isinstance(window.rate_per_s, Absence)]
    return Workload(
        rate_per_s=max([rate for rate in rates if rate > 0], default=expected.rate_per_s),
        cv=expected.cv,
        prompt_tokens_mean=max(1.0, known(seen.prompt_tokens_mean, expected.prompt_tokens_mean)),
        output_tokens_mean=max(1.0, known(seen.output_tokens_mean, expected.output_tokens_mean)),
    )
