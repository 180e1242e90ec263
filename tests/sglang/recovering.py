"""Engines that are made anew when their processes are killed."""

from engines.sglang.adapter import SglangEngine
from planner.layout import Pipeline
from tests.support.sglang import options_for
from tests.support.vllm import graph_of, llama


class Made:
    """Makes engines with as many ranks as the pipeline has stages, and remembers them; other options by name."""

    def __init__(self, **options: object) -> None:
        self._options = options
        self.engines: list[SglangEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> SglangEngine:
        options = options_for(llama(), ranks=pipeline.granularity, **self._options)
        self.engines.append(SglangEngine(options, pipeline, epoch=epoch, graph=graph_of(llama())))
        return self.engines[-1]


def pid_of(engine: SglangEngine, victim: str) -> int:
    """Return the process of an engine that people call so."""
    pids = engine.pids
    of_one: dict[str, int] = {
        "the API server": pids["api"],
        "the first scheduler": pids["workers"][0],
        "the last scheduler": pids["workers"][-1],
        "the detokenizer": pids["detokenizers"][0],
    }
    return of_one[victim]
