"""SGLang under flexpiped's engine, in this process's hands: moved in place, or restarted."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engines.sglang.adapter import SglangEngine
from engines.sglang.options import SglangOptions
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from tests.bench.program import EngineSetup
from tests.bench.served_rig import ServedRig, common_options, graph_of, post


class SglangRig(ServedRig):
    """One SGLang."""

    name = "SGLang"

    def __init__(self, options: SglangOptions, graph: ModelGraph) -> None:
        self._options = options
        self._graph = graph
        super().__init__()

    def _make(self, pipeline: Pipeline) -> SglangEngine:
        self._made = SglangEngine(self._options, pipeline, graph=self._graph)
        return self._made

    async def _empty_prefix_cache(self) -> None:
        await post(self.engine, "/flush_cache", key=self._made.admin_key)


@asynccontextmanager
async def sglang_rig(model: Path, setup: EngineSetup, *, python: Path) -> AsyncIterator[SglangRig]:
    """Start SGLang with the first layout; it ends with the scope."""
    graph = graph_of(model)
    rig = SglangRig(SglangOptions(**common_options(str(model), graph, setup, python=str(python))), graph)
    try:
        await rig.start()
        yield rig
    finally:
        await rig.close()
