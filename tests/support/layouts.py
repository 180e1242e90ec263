"""Layouts and a resolver for tests that need no planner: even cuts over the devices ``cpu:0`` and on."""

from flexpiped.handover_records import Wanted
from planner.errors import InvalidLayout, NoFeasiblePlan
from planner.layout import Pipeline, pipeline_of
from planner.memory import KvBudget, MemoryCheck, check_memory
from tests.support.graphs import weighted_graph
from topology.device import cpu_devices
from topology.units import MIB

NUM_DECODERS = 8


def even_pipeline(stages: int, *, num_decoders: int = NUM_DECODERS) -> Pipeline:
    """Return a pipeline of ``stages`` stages on as many CPU devices."""
    cuts = [num_decoders * stage // stages for stage in range(1, stages)]
    return pipeline_of(device_ids=[f"cpu:{index}" for index in range(stages)], cuts=cuts, num_decoders=num_decoders)


class EvenResolver:
    """Resolves a number of stages to even cuts; ``auto`` to one stage; a layout is the number of its stages in text."""

    def __init__(self, *, memory_bytes: int = 64 * MIB, rules_broken: tuple[str, ...] = ()) -> None:
        self.memory_bytes = memory_bytes
        self.rules_broken = rules_broken

    def resolve(
        self,
        wanted: Wanted,
        *,
        current: Pipeline,
        resident: object = (),  # noqa: ARG002
        taken: frozenset[str] = frozenset(),
    ) -> Pipeline:
        if wanted.layout is not None and not wanted.layout.isdecimal():
            raise InvalidLayout("a layout of this test is a number")
        stages = wanted.stages if isinstance(wanted.stages, int) else int(wanted.layout or 1)
        if stages > current.num_decoders:
            raise NoFeasiblePlan(f"the model has {current.num_decoders} decoder layers, so at most as many stages")
        if wanted.layout is not None:
            return even_pipeline(stages, num_decoders=current.num_decoders)
        return self.beside(Wanted(stages=stages), taken=taken, num_decoders=current.num_decoders)

    def beside(self, wanted: Wanted, *, taken: frozenset[str], num_decoders: int = NUM_DECODERS) -> Pipeline:
        """Return even cuts over the first devices that are not taken, of as many as there are decoders."""
        left = [device for index in range(num_decoders) if (device := f"cpu:{index}") not in taken]
        stages = wanted.stages if isinstance(wanted.stages, int) else 1
        if stages > len(left):
            raise NoFeasiblePlan(f"{len(left)} devices are left")
        cuts = [num_decoders * stage // stages for stage in range(1, stages)]
        return pipeline_of(device_ids=left[:stages], cuts=cuts, num_decoders=num_decoders)

    def broken_rules(
        self,
        target: Pipeline,  # noqa: ARG002
        *,
        current: Pipeline | None,  # noqa: ARG002
        second_instance: bool = False,  # noqa: ARG002
    ) -> tuple[str, ...]:
        """Return ``rules_broken``: the rules of this test."""
        return self.rules_broken

    def check_second(
        self,
        *,
        current: Pipeline,
        target: Pipeline,
        kv: KvBudget,
        is_another_engine: bool = False,  # noqa: ARG002
    ) -> MemoryCheck:
        """Check 8 devices of ``memory_bytes`` with decoders of 1 MiB, with 1 byte of KV cache per token."""
        return check_memory(
            graph=weighted_graph([MIB] * current.num_decoders),
            current=current,
            target=target,
            devices=cpu_devices(count=8, memory_bytes=self.memory_bytes),
            kv=kv,
            second_instance=True,
        )
