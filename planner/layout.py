"""Layouts: which decoders run where. Plain values, checked when they are made.

A stage holds consecutive decoders; the embedding always lies with the first stage and the head with the last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.errors import InvalidLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Decoders ``first_decoder <= i < end_decoder`` on a device group, whose size is the tensor-parallel degree."""

    device_ids: tuple[str, ...]
    first_decoder: int
    end_decoder: int

    @property
    def num_decoders(self) -> int:
        return self.end_decoder - self.first_decoder

    def holds(self, decoder: int) -> bool:
        return self.first_decoder <= decoder < self.end_decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The stages of one replica, first to last. They cover decoders 0 to ``num_decoders - 1`` without gap or overlap.

    Raises:
        InvalidLayout: The stages have gaps or overlaps, no device, or share a device.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InvalidLayout("a pipeline needs at least one stage")
        expected = 0
        seen: set[str] = set()
        for index, stage in enumerate(self.stages):
            if stage.first_decoder != expected or stage.num_decoders < 0:
                raise InvalidLayout(
                    f"stage {index} holds decoders {stage.first_decoder} to {stage.end_decoder - 1}, "
                    f"but must begin at decoder {expected}"
                )
            if not stage.device_ids:
                raise InvalidLayout(f"stage {index} names no device")
            if shared := sorted(seen.intersection(stage.device_ids)):
                raise InvalidLayout(
                    f"stage {index}: two stages of one model never share a device ({', '.join(shared)})"
                )
            if len(set(stage.device_ids)) != len(stage.device_ids):
                raise InvalidLayout(f"stage {index} names a device twice")
            seen.update(stage.device_ids)
            expected = stage.end_decoder

    @property
    def granularity(self) -> int:
        return len(self.stages)

    @property
    def num_decoders(self) -> int:
        return self.stages[-1].end_decoder

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(device for stage in self.stages for device in stage.device_ids)

    def stage_of(self, decoder: int) -> Stage:
        """Return the stage that holds ``decoder``."""
        for stage in self.stages:
            if stage.holds(decoder):
                return stage
        raise InvalidLayout(f"no stage holds decoder {decoder}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All pipelines (replicas) of one model. The epoch is the number of the layout in force."""

    pipelines: tuple[Pipeline, ...]
    epoch: int = 0


def pipeline_of(*, device_ids: Sequence[str], cuts: Iterable[int], num_decoders: int) -> Pipeline:
    """Build a pipeline of one device per stage from its cuts (each cut is the first decoder of the next stage)."""
    bounds = [0, *cuts, num_decoders]
    if len(bounds) - 1 != len(device_ids):
        raise InvalidLayout(f"{len(bounds) - 1} stages but {len(device_ids)} devices")
    return Pipeline(
        stages=tuple(
            Stage(device_ids=(device,), first_decoder=first, end_decoder=end)
            for device, first, end in zip(device_ids, bounds[:-1], bounds[1:], strict=True)
        )
    )
