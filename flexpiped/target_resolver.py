"""From what an operator asks for to a pipeline, with the planner's help."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from flexpiped.config_values import Auto
from flexpiped.device_sharing import Held, held_by, together
from flexpiped.handover_records import Wanted
from planner import prediction
from planner.candidate_plan import PlanAnswer
from planner.errors import NoFeasiblePlan
from planner.layout import Pipeline
from planner.layout_file import parse_layout
from planner.memory import KvBudget, MemoryCheck, check_memory
from planner.question import PlanQuestion
from planner.routing import Pace
from topology.device import Device

if TYPE_CHECKING:
    from planner.replanner import PlanSession

USUAL_STAGES: Final = 2  # layers can move between two, and few devices are taken


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
        first = question()
        self._graph = first.graph
        self._engine = first.engine
        self._device_ids = tuple(device.id for device in first.topology.devices)
        self.max_stages = first.engine.max_stages  # the engine's own limit and the devices'
        self._session: PlanSession | None = None

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache of the whole model."""
        return self._graph.kv_bytes_per_token

    def held_by(self, pipelines: Iterable[Pipeline], *, adapter_bytes: int = 0) -> Held:
        """Return what pipelines of this model hold of each device, with ``adapter_bytes`` on all of them."""
        engine = self._engine
        layers = held_by(
            pipelines, self._graph, kv_tokens=engine.kv_tokens or 0, kv_device_bytes=engine.kv_device_bytes
        )
        return together([layers, dict.fromkeys(self._device_ids, adapter_bytes)]) if adapter_bytes else layers

    def begin(self, stages: int | Auto | None) -> tuple[Pipeline, str]:
        """Return the pipeline to start with, and why it has not the usual number of stages where None is asked for.

        Raises as ``first``.
        """
        if stages is not None:
            return self.first(stages), ""
        try:
            return self.first(USUAL_STAGES), ""
        except NoFeasiblePlan as error:  # one device, an engine that has one stage, a model too large for two
            return self.first(Auto.AUTO), f"{USUAL_STAGES} stages cannot be: {error}"

    def first(self, stages: int | Auto) -> Pipeline:
        """Return the pipeline to start with.

        Raises:
            PlannerError: Nothing fits; the message has the numbers.
        """
        return self._pipeline(self.answer(stages, current=None))

    def resolve(
        self,
        wanted: Wanted,
        *,
        current: Pipeline,
        resident: Sequence[tuple[str, ...]] = (),
        taken: frozenset[str] = frozenset(),
    ) -> Pipeline:
        """Return the pipeline to change to. Raises as ``first``; ``InvalidLayout`` for a malformed layout file.

        1. A layout file is what it says.
        2. Ranks that are resident stay where they are: the plan is one for them, where they can have as many stages.
        3. Else any device will do: another instance is needed where ranks are resident.
        """
        if wanted.layout is not None:  # 1
            return parse_layout(wanted.layout)
        stages = Auto.AUTO if wanted.stages is None else wanted.stages
        second = wanted.replica or wanted.engine is not None
        return self._pipeline(
            self.answer(stages, current=current, resident=resident, second_instance=second, taken=taken)
        )

    def beside(self, wanted: Wanted, *, taken: frozenset[str]) -> Pipeline:
        """Return the pipeline of a replica more, which shares no device with the others. Raises as ``resolve``."""
        if wanted.layout is None:
            if all(device.id in taken for device in self._ask().topology.devices):
                raise NoFeasiblePlan("no device is left")
            return self._pipeline(self.answer(wanted.stages or Auto.AUTO, current=None, taken=taken))
        pipeline = parse_layout(wanted.layout)
        if held := sorted(taken & set(pipeline.device_ids)):
            raise NoFeasiblePlan(f"{', '.join(held)} have stages of other replicas")
        if broken := self.broken_rules(pipeline, current=None):
            raise NoFeasiblePlan("; ".join(broken))
        return pipeline

    def answer(
        self,
        stages: int | Auto,
        *,
        current: Pipeline | None,
        resident: Sequence[tuple[str, ...]] = (),
        second_instance: bool = False,
        taken: frozenset[str] = frozenset(),
    ) -> PlanAnswer:
        """Return the whole plan, with every candidate. Raises as ``first`` where more stages are asked for than can be.

        Devices that are ``taken`` by other replicas are left out.

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
            topology=asked.topology.without(taken),
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

    def devices(self) -> Sequence[Device]:
        """Return the devices as they are now: what other models hold of them counts as taken by others."""
        return self._ask().topology.devices

    def pace_of(self, pipeline: Pipeline) -> Pace:
        """Return how fast a pipeline is predicted to be, for requests such as are expected.

        Raises:
            PlannerError: There are no times for it.
        """
        from planner.stage_times import pipeline_times

        asked = self._ask()
        kv_tokens = asked.engine.kv_tokens_of(asked.graph, pipeline) or asked.sequence_tokens
        times = pipeline_times(asked, pipeline, kv_tokens=kv_tokens)
        return prediction.Pipeline(times, asked.workload)

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

        Where it goes by the layout, and for another engine, the KV cache is that of the configuration, in slots of one
        token.
        """
        asked = self._ask()
        tokens = asked.engine.kv_tokens_of(asked.graph, target)
        own = KvBudget(block_tokens=1, capacity_blocks=tokens or kv.live_slots, live_blocks=kv.live_slots)
        return check_memory(
            graph=self._graph,
            current=current,
            target=target,
            devices=asked.topology.devices,
            kv=kv,
            second_instance=True,
            second_kv=own if is_another_engine or asked.engine.kv_per_device else None,
        )

    def _pipeline(self, answer: PlanAnswer) -> Pipeline:
        from planner.planning import require_plan

        return require_plan(answer).pipelines[0]
