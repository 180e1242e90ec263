"""What each stage is and does, by what the workers answer."""

from collections.abc import Callable, Mapping, Sequence

from engines.busy import BusyShares
from engines.protocol import StageStatus
from engines.served.channel import Message
from engines.served.ranks import Ranks
from planner.layout import Pipeline, Stage


class StageReader:
    """Remembers how busy each rank was."""

    def __init__(self, *, ranks: Ranks, clock: Callable[[], float]) -> None:
        self._ranks = ranks
        self._busy = BusyShares(clock=clock)

    def read(self, pipeline: Pipeline, answers: Mapping[int, Message]) -> tuple[StageStatus, ...]:
        """Return what the answers of the workers, by global rank, say of each stage."""
        return tuple(self._stage(index, stage, answers) for index, stage in enumerate(pipeline.stages))

    def _stage(self, index: int, stage: Stage, answers: Mapping[int, Message]) -> StageStatus:
        place, degree = self._ranks.rank_of(stage.device_ids), self._ranks.tensor_parallel
        assert place is not None, "the pipeline in force lies on the ranks"
        group = [rank for rank in range(place * degree, (place + 1) * degree) if rank in answers]
        busy = [share for rank in group if (share := self._busy.share(rank, answers[rank]["busy_s"])) is not None]
        return StageStatus(
            index=index,
            device_ids=stage.device_ids,
            first_decoder=stage.first_decoder,
            end_decoder=stage.end_decoder,
            pids=tuple(answers[rank]["pid"] for rank in group),
            weights_bytes=sum(answers[rank]["weights_bytes"] for rank in group),
            kv_mapped_bytes=sum(answers[rank]["kv_mapped_bytes"] for rank in group),
            busy=max(busy) if busy else None,
            runs=_together([answers[rank]["runs"] for rank in group]),
        )


def _together(runs: Sequence[str]) -> str:
    """Return what a stage runs: eager until all its ranks are compiled."""
    return "eager" if "eager" in runs else next(iter(runs), "")
