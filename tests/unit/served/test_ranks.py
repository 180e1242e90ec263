"""Layouts over resident ranks."""

import pytest

from engines.served.ranks import Ranks, boot_counts, rank_devices, widened
from planner.layout import Pipeline, Stage, pipeline_of

THREE = Ranks(device_ids=("cpu:0", "cpu:1", "cpu:2"))


def pipeline(devices: str, *cuts: int) -> Pipeline:
    return pipeline_of(device_ids=[f"cpu:{index}" for index in devices], cuts=cuts, num_decoders=8)


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (pipeline("012", 3, 5), (3, 2, 3)),
        (pipeline("02", 5), (5, 0, 3)),
        (pipeline("02", 8), (8, 0, 0)),
        (pipeline("012", 4, 8), (4, 4, 0)),
    ],
)
def test_layouts_and_decoders_per_rank_say_the_same(target: Pipeline, counts: tuple[int, ...]) -> None:
    assert THREE.refusal_of(target) is None
    assert THREE.counts_of(target) == counts
    assert THREE.pipeline_of(counts) == target


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (pipeline("05", 4), "there is no rank on cpu:5: the ranks are on cpu:0, cpu:1, cpu:2"),
        (pipeline("12", 4), "the embedding stays on rank 0: the first stage must be on cpu:0"),
        (
            pipeline("01", 4),
            "the head stays on rank 2: the last stage must be on cpu:2, with or without decoders,"
            " or the engine be started with fewer ranks",
        ),
        (pipeline("021", 3, 5), "the stages must follow the order of the ranks: cpu:0, cpu:1, cpu:2"),
        (pipeline("02", 0), "rank 0 must hold at least one decoder"),
    ],
)
def test_what_the_ranks_cannot_run_is_refused_in_words(target: Pipeline, reason: str) -> None:
    assert THREE.refusal_of(target) == reason


def test_a_rank_of_several_devices() -> None:
    ranks = Ranks(device_ids=("a", "b", "c", "d"), tensor_parallel=2)
    target = Pipeline(
        stages=(
            Stage(device_ids=("a", "b"), first_decoder=0, end_decoder=5),
            Stage(device_ids=("c", "d"), first_decoder=5, end_decoder=8),
        )
    )
    assert (ranks.count, ranks.counts_of(target), ranks.refusal_of(target)) == (2, (5, 3), None)
    with pytest.raises(ValueError, match="3 devices are no whole number of ranks of 2"):
        Ranks(device_ids=("a", "b", "c"), tensor_parallel=2)


@pytest.mark.parametrize(
    ("wanted", "booted"),
    [((4, 4), (4, 4)), ((8, 0), (7, 1)), ((8, 0, 0), (6, 1, 1)), ((4, 0, 4), (3, 1, 4)), ((1, 0, 3), (1, 1, 2))],
)
def test_vllm_boots_with_a_decoder_on_each_rank(wanted: tuple[int, ...], booted: tuple[int, ...]) -> None:
    assert boot_counts(wanted) == booted


def test_more_ranks_than_decoders_cannot_boot() -> None:
    with pytest.raises(ValueError, match="3 ranks but only 2 decoders"):
        boot_counts((2, 0, 0))


def test_spare_ranks_lie_before_the_last() -> None:
    spare = [("cpu:2",), ("cpu:3",)]
    assert rank_devices(pipeline("01", 4), ranks=4, spare=spare) == ("cpu:0", "cpu:2", "cpu:3", "cpu:1")
    assert rank_devices(pipeline("0"), ranks=2, spare=spare) == ("cpu:0", "cpu:2")
    assert rank_devices(pipeline("01", 4), ranks=2, spare=spare) == ("cpu:0", "cpu:1")
    with pytest.raises(ValueError, match="6 ranks asked for, but there are devices for 4"):
        rank_devices(pipeline("01", 4), ranks=6, spare=spare)


def test_stages_are_widened_to_groups_of_devices() -> None:
    wide = widened(pipeline("01", 4), devices=["a", "b", "c", "d", "e"], degree=2)
    assert [stage.device_ids for stage in wide.stages] == [("a", "b"), ("c", "d")]
    assert widened(wide, devices=["x"], degree=2) == wide
    with pytest.raises(ValueError, match="2 stages of 2 devices, but there are 3"):
        widened(pipeline("01", 4), devices=["a", "b", "c"], degree=2)
