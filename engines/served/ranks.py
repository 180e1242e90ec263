"""Pipelines over an engine's ranks: pure functions between the stages of a layout and the decoders of each rank.

Ranks are resident: their number and devices are fixed when the engine starts. Embedding and head cannot move, so the
first stage is rank 0 and the last stage is the last rank. Rank 0 holds at least one decoder; the last may hold none,
and a middle rank without decoders is left out of the layout. The engines boot only with a decoder on each rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.layout import Pipeline, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """The pipeline ranks of one engine. ``device_ids`` are in rank order, ``tensor_parallel`` per pipeline rank."""

    device_ids: tuple[str, ...]
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if not self.device_ids or len(self.device_ids) % self.tensor_parallel:
            raise ValueError(f"{len(self.device_ids)} devices are no whole number of ranks of {self.tensor_parallel}")

    @property
    def count(self) -> int:
        return len(self.device_ids) // self.tensor_parallel

    def devices_of(self, rank: int) -> tuple[str, ...]:
        return self.device_ids[rank * self.tensor_parallel : (rank + 1) * self.tensor_parallel]

    def rank_of(self, device_ids: tuple[str, ...]) -> int | None:
        """Return the pipeline rank on exactly these devices."""
        return next((rank for rank in range(self.count) if self.devices_of(rank) == device_ids), None)

    def refusal_of(self, pipeline: Pipeline) -> str | None:
        """Say why these ranks cannot run ``pipeline``, None when they can."""
        places = [self.rank_of(stage.device_ids) for stage in pipeline.stages]
        for stage, rank in zip(pipeline.stages, places, strict=True):
            if rank is None:
                return f"there is no rank on {' + '.join(stage.device_ids)}: the ranks are on {self._in_words()}"
        known = [rank for rank in places if rank is not None]
        if known != sorted(known):
            return f"the stages must follow the order of the ranks: {self._in_words()}"
        if known[0] != 0:
            return f"the embedding stays on rank 0: the first stage must be on {' + '.join(self.devices_of(0))}"
        if known[-1] != self.count - 1:
            last = " + ".join(self.devices_of(self.count - 1))
            return (
                f"the head stays on rank {self.count - 1}: the last stage must be on {last}, with or without decoders,"
                " or the engine be started with fewer ranks"
            )
        if pipeline.stages[0].num_decoders < 1:
            return "rank 0 must hold at least one decoder"
        return None

    def counts_of(self, pipeline: Pipeline) -> tuple[int, ...]:
        """Return the number of decoders on each pipeline rank, for a pipeline that is not refused."""
        counts = [0] * self.count
        for stage in pipeline.stages:
            rank = self.rank_of(stage.device_ids)
            assert rank is not None, "ask refusal_of first"
            counts[rank] = stage.num_decoders
        return tuple(counts)

    def pipeline_of(self, counts: Sequence[int]) -> Pipeline:
        """Return the pipeline with that many decoders on each pipeline rank."""
        stages: list[Stage] = []
        first = 0
        for rank, count in enumerate(counts):
            if count or rank in (0, self.count - 1):
                stages.append(Stage(device_ids=self.devices_of(rank), first_decoder=first, end_decoder=first + count))
            first += count
        return Pipeline(stages=tuple(stages))

    def _in_words(self) -> str:
        return ", ".join(" + ".join(self.devices_of(rank)) for rank in range(self.count))


def boot_counts(counts: Sequence[int]) -> tuple[int, ...]:
    """Return the nearest numbers of decoders that an engine boots with: at least one on each rank.

    A rank without any is given one by the rank that has most (the nearest of these).

    Raises:
        ValueError: There are more ranks than decoders.
    """
    if sum(counts) < len(counts):
        raise ValueError(f"{len(counts)} ranks but only {sum(counts)} decoders: the engine starts with one on each")
    result = list(counts)
    for rank, count in enumerate(counts):
        if count == 0:
            giver = max(range(len(result)), key=lambda other: (result[other], -abs(other - rank)))
            result[giver] -= 1
            result[rank] = 1
    return tuple(result)


def widened(pipeline: Pipeline, *, devices: Sequence[str], degree: int) -> Pipeline:
    """Return ``pipeline`` with ``degree`` devices per stage, in their order. The planner places one per stage.

    Raises:
        ValueError: There are not enough devices.
    """
    if degree == 1 or all(len(stage.device_ids) == degree for stage in pipeline.stages):
        return pipeline
    if len(devices) < degree * pipeline.granularity:
        raise ValueError(f"{pipeline.granularity} stages of {degree} devices, but there are {len(devices)} devices")
    groups = [tuple(devices[start : start + degree]) for start in range(0, len(devices), degree)]
    return Pipeline(
        stages=tuple(replace(stage, device_ids=group) for stage, group in zip(pipeline.stages, groups, strict=False))
    )


def rank_devices(pipeline: Pipeline, *, ranks: int, spare: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the devices for ``ranks`` pipeline ranks: those of ``pipeline``, and spare ones before the last stage.

    Raises:
        ValueError: There are not enough spare device groups.
    """
    groups = [stage.device_ids for stage in pipeline.stages]
    more = [group for group in spare if group not in groups][: max(0, ranks - len(groups))]
    if len(groups) + len(more) < ranks:
        raise ValueError(f"{ranks} ranks asked for, but there are devices for {len(groups) + len(more)}")
    head = groups[-1:] if len(groups) > 1 else []
    ordered = [*groups[: len(groups) - len(head)], *more, *head]
    return tuple(device for group in ordered for device in group)
