"""Layouts and a resolver for tests that need no planner: even cuts over the devices ``cpu:0`` and on."""

from flexpiped.handover_records import Wanted
from planner.errors import InvalidLayout, NoFeasiblePlan
from planner.layout import Pipeline, pipeline_of

NUM_DECODERS = 8


def even_pipeline(stages: int, *, num_decoders: int = NUM_DECODERS) -> Pipeline:
    """Return a pipeline of ``stages`` stages on as many CPU devices."""
    cuts = [num_decoders * stage // stages for stage in range(1, stages)]
    return pipeline_of(device_ids=[f"cpu:{index}" for index in range(stages)], cuts=cuts, num_decoders=num_decoders)


class EvenResolver:
    """Resolves a number of stages to even cuts; ``auto`` to one stage; a layout is the number of its stages in text."""

    def resolve(self, wanted: Wanted, *, current: Pipeline) -> Pipeline:
        if wanted.layout is not None and not wanted.layout.isdecimal():
            raise InvalidLayout("a layout of this test is a number")
        stages = wanted.stages if isinstance(wanted.stages, int) else int(wanted.layout or 1)
        if stages > current.num_decoders:
            raise NoFeasiblePlan(f"the model has {current.num_decoders} decoder layers, so at most as many stages")
        return even_pipeline(stages, num_decoders=current.num_decoders)
