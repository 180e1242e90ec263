"""vLLM under flexpiped's engine, in this process's hands: moved in place, restarted, or paused its own way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from tests.bench.program import EngineSetup
from tests.bench.served_rig import ServedRig, common_options, graph_of, post


class VllmRig(ServedRig):
    """One vLLM."""

    name = "vLLM"

    def __init__(self, options: VllmOptions, graph: ModelGraph) -> None:
        self._options = options
        self._graph = graph
        super().__init__()

    def _make(self, pipeline: Pipeline) -> VllmEngine:
        return VllmEngine(self._options, pipeline, graph=self._graph)

    async def _empty_prefix_cache(self) -> None:
        await post(self.engine, "/reset_prefix_cache")

    async def pause(self, hold_s: float) -> None:
        """Pause generation as vLLM itself offers it (``mode=keep``), hold it, and resume."""
        await post(self.engine, "/pause?mode=keep")
        await asyncio.sleep(hold_s)
        await post(self.engine, "/resume")


def options_for(model: Path, graph: ModelGraph, setup: EngineSetup, *, python: Path) -> VllmOptions:
    """Return the engine's options, as the daemon's defaults where ``setup`` says nothing."""
    given = common_options(str(model), graph, setup, python=str(python))
    return VllmOptions(**given, env={"VLLM_SERVER_DEV_MODE": "1"})  # offers /pause


@asynccontextmanager
async def vllm_rig(model: Path, setup: EngineSetup, *, python: Path) -> AsyncIterator[VllmRig]:
    """Start vLLM with the first layout; it ends with the scope."""
    graph = graph_of(model)
    rig = VllmRig(options_for(model, graph, setup, python=python), graph)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.close()
