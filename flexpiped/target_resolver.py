"""From what an operator asks for to a pipeline, with the planner's help."""

from collections.abc import Sequence

from flexpiped.config_values import Auto
from flexpiped.handover_records import Wanted
from planner.layout import Pipeline
from planner.layout_file import parse_layout
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

    def first(self, stages: int | Auto) -> Pipeline:
        """Return the pipeline to start with.

        Raises:
            PlannerError: Nothing fits; the message has the numbers.
        """
        return self._plan(stages, current=None)

    def resolve(self, wanted: Wanted, *, current: Pipeline) -> Pipeline:
        """Return the pipeline to change to. Raises as ``first``; ``InvalidLayout`` for a malformed layout file."""
        if wanted.layout is not None:
            return parse_layout(wanted.layout)
        return self._plan(Auto.AUTO if wanted.stages is None else wanted.stages, current=current)

    def _plan(self, stages: int | Auto, *, current: Pipeline | None) -> Pipeline:
        from planner.solver import plan  # loads OR-Tools, which takes a moment: in the thread that plans

        request = PlanRequest(
            graph=self._graph,
            devices=self._devices,
            num_stages=None if stages is Auto.AUTO else stages,
            kv_bytes_per_decoder=self._kv_bytes_per_decoder,
            current=current,
        )
        return plan(request).pipeline
