"""From a pipeline to the roles of workers."""

from engines.native.messages import StageSpec
from planner.layout import Pipeline


def specs_of(pipeline: Pipeline, worker_of: dict[str, int]) -> dict[int, StageSpec]:
    """Return the role of each worker that carries a stage, first stage first."""
    workers = [worker_of[stage.device_ids[0]] for stage in pipeline.stages]
    last = len(workers) - 1
    return {
        worker: StageSpec(
            first_decoder=stage.first_decoder,
            end_decoder=stage.end_decoder,
            is_first=index == 0,
            is_last=index == last,
            next_worker=workers[index + 1] if index < last else -1,
        )
        for index, (worker, stage) in enumerate(zip(workers, pipeline.stages, strict=True))
    }
