"""From what an operator asks for to a pipeline, with the planner's help."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flexpiped.config_values import Auto
from flexpiped.handover_records import Wanted
from planner.candidate_plan import PlanAnswer
from planner.layout import Pipeline
from planner.layout_file import parse_layout
from planner.memory import KvBudget, MemoryCheck, check_memory
from planner.question import PlanQuestion

if TYPE_CHECKING:
    from planner.replanner import PlanSession


class PlannerResolver:
    """A ``TargetResolver`` for one model on the devices that are here. Each plan begins with what the last one found.

    Args:
        question: Asked anew for each plan, in the thread that plans: what is free on the devices, and what has been
            measured, may have changed. Number of stages, layout in force and resident ranks come with each call.
        on_plan: Told in that thread how many seconds a plan took, also one that found nothing.
    """

    def __init__(
        self,
        question: Callable[[], PlanQuestion],
        *,
        on_plan: Callable[[float], object] = lambda _took_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_plan = on_plan
        self._ask = question
        self._clock = clock
        self._graph = question().graph
        self._session: PlanSession | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache of the whole model."""
        return self._graph.kv_bytes_per_token

    def first(self, stages: int | Auto) -> Pipeline:
        """Return the pipeline to start with.

        Raises:
            PlannerError: Nothing fits; the message has the numbers.
        """
        return self._pipeline(self.answer(stages, current=None))

    def resolve(self, wanted: Wanted, *, current: Pipeline, resident: Sequence[tuple[str, ...]] = ()) -> Pipeline:
        """Return the pipeline to change to. Raises as ``first``; ``InvalidLayout`` for a malformed layout file.

        1. A layout file is what it says.
        2. Ranks that are resident stay where they are: the plan is one for them, where they can have as many stages.
        3. Else any device will do: another instance is needed where ranks are resident.
        """
        if wanted.layout is not None:  # 1
            return parse_layout(wanted.layout)
        stages = Auto.AUTO if wanted.stages is None else wanted.stages
        second = wanted.replica or wanted.engine is not None
        return self._pipeline(self.answer(stages, current=current, resident=resident, second_instance=second))

    def answer(
        self,
        stages: int | Auto,
        *,
        current: Pipeline | None,
        resident: Sequence[tuple[str, ...]] = (),
        second_instance: bool = False,
    ) -> PlanAnswer:
        """Return the whole plan, with every candidate. Raises as ``first`` where more stages are asked for than can be.

        Resident ranks count where they can have as many stages: 2 at least, as both ends are on ranks of their own.
        Else, and where a ``second_instance`` is asked for, nothing of what is held is shared.
        """
        from planner.planning import plan  # loads OR-Tools, which takes a moment: in the thread that plans
        from planner.replanner import PlanSession

        possible = stages is Auto.AUTO or min(2, len(resident)) <= stages <= len(resident)
        in_place = not second_instance and (possible or not resident)
        asked = self._ask()
        question = replace(
            asked,
            engine=replace(asked.engine, resident=tuple(resident) if in_place else ()),
            num_stages=None if stages is Auto.AUTO else stages,
            current=current,
            shares_current=in_place,
        )
        self._session = self._session or PlanSession()
        began_s = self._clock()
        try:
            return plan(question, clock=self._clock, session=self._session)
        finally:
            self._on_plan(self._clock() - began_s)

    def broken_rules(
        self, target: Pipeline, *, current: Pipeline | None, second_instance: bool = False
    ) -> tuple[str, ...]:
        """Return a sentence for each rule of the planner that ``target`` breaks, whoever made it.

        Raises:
            InvalidLayout: ``target`` is not a layout of this model.
        """
        from planner.problem import check_pipeline

        return check_pipeline(replace(self._ask(), current=current, shares_current=not second_instance), target)

    def check_second(
        self, *, current: Pipeline, target: Pipeline, kv: KvBudget, is_another_engine: bool = False
    ) -> MemoryCheck:
        """Say whether the devices can hold a second instance beside the first: nothing is shared between them.

        For another engine the KV cache is that of its part of the configuration, in slots of one token.
        """
        asked = self._ask()
        own = KvBudget(
            block_tokens=1, capacity_blocks=asked.engine.kv_tokens or kv.live_slots, live_blocks=kv.live_slots
        )
        return check_memory(
            graph=self._graph,
            current=current,
            target=target,
            devices=asked.topology.devices,
            kv=kv,
            second_instance=True,
            second_kv=own if is_another_engine else None,
        )

    def _pipeline(self, answer: PlanAnswer) -> Pipeline:
        from planner.planning import require_plan

        return require_plan(answer).pipelines[0]
