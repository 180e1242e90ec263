"""From what an operator asks for to a pipeline, with the planner's help."""

from collections.abc import Sequence
from dataclasses import replace

from flexpiped.config_values import Auto
from flexpiped.handover_records import Wanted
from planner.layout import Pipeline
from planner.layout_file import parse_layout
from planner.memory import KvBudget, MemoryCheck, check_memory
from planner.model_graph import ModelGraph
from planner.plan import PlanRequest
from topology.device import Device


class PlannerResolver:
    """A ``TargetResolver`` for one model on a set of devices.

    Args:
        kv_cache_bytes: KV capacity over all decoders together.
    """

    def __init__(self, *, graph: ModelGraph, devices: Sequence[Device], kv_cache_bytes: int) -> None:
        self._graph = graph
        self._devices = tuple(devices)
        self._kv_bytes_per_decoder = kv_cache_bytes // max(1, graph.num_decoders)

    @property
    def kv_bytes_per_token(self) -> int:
        """What a token takes in the KV cache of the whole model."""
        return self._graph.kv_bytes_per_token

    def first(self, stages: int | Auto) -> Pipeline:
        """Return the pipeline to start with.

        Raises:
            PlannerError: Nothing fits; the message has the numbers.
        """
        return self._plan(stages, current=None)

    def resolve(self, wanted: Wanted, *, current: Pipeline, resident: Sequence[tuple[str, ...]] = ()) -> Pipeline:
        """Return the pipeline to change to. Raises as ``first``; ``InvalidLayout`` for a malformed layout file.

        1. A layout file is what it says.
        2. Ranks that are resident stay where they are: the plan is one for them, where they can have as many stages.
        3. Else any device will do: another instance is needed where ranks are resident.
        """
        if wanted.layout is not None:  # 1
            return parse_layout(wanted.layout)
        stages = Auto.AUTO if wanted.stages is None else wanted.stages
        possible = stages is Auto.AUTO or min(2, len(resident)) <= stages <= len(resident)
        if resident and possible and not wanted.replica:  # 2
            return self._plan_resident(stages, current=current, groups=resident)
        return self._plan(stages, current=current)  # 3

    def check_second(
        self, *, current: Pipeline, target: Pipeline, kv: KvBudget, is_another_engine: bool = False
    ) -> MemoryCheck:
        """Say whether the devices can hold a second instance beside the first: nothing is shared between them."""
        return check_memory(
            graph=self._graph,
            current=current,
            target=target,
            devices=self._devices,
            kv=kv,
            second_instance=True,
            second_kv=self._own_kv(live_slots=kv.live_slots) if is_another_engine else None,
        )

    def _own_kv(self, *, live_slots: int) -> KvBudget:
        """Return the KV cache as this engine's part of the configuration has it, in slots of one token."""
        slot_bytes = max((decoder.kv_bytes_per_token for decoder in self._graph.decoders), default=0)
        slots = self._kv_bytes_per_decoder // max(1, slot_bytes)
        return KvBudget(block_tokens=1, capacity_blocks=slots, live_blocks=live_slots)

    def _plan_resident(self, stages: int | Auto, *, current: Pipeline, groups: Sequence[tuple[str, ...]]) -> Pipeline:
        """Plan on device groups in their order, each as one device that has the memory of all."""
        known = {device.id: device for device in self._devices}
        names = {group: "+".join(group) for group in groups}
        devices = [
            Device(
                id=names[group],
                kind=known[group[0]].kind,
                memory_total_bytes=sum(known[device].memory_total_bytes for device in group),
                memory_reserved_bytes=sum(known[device].memory_reserved_bytes for device in group),
            )
            for group in groups
        ]
        now = Pipeline(stages=tuple(replace(s, device_ids=(names[s.device_ids],)) for s in current.stages))
        planned = self._plan(stages, current=now, devices=devices)
        group_of = {name: group for group, name in names.items()}
        return Pipeline(stages=tuple(replace(s, device_ids=group_of[s.device_ids[0]]) for s in planned.stages))

    def _plan(
        self, stages: int | Auto, *, current: Pipeline | None, devices: Sequence[Device] | None = None
    ) -> Pipeline:
        """Plan on any devices, or on these in this order."""
        from planner.even_pipeline import plan  # loads OR-Tools, which takes a moment: in the thread that plans

        request = PlanRequest(
            graph=self._graph,
            devices=self._devices if devices is None else tuple(devices),
            num_stages=None if stages is Auto.AUTO else stages,
            kv_bytes_per_decoder=self._kv_bytes_per_decoder,
            current=current,
            fixed_order=devices is not None,
        )
        return plan(request).pipeline
