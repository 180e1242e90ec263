"""How many micro-batches and threads, from the stages and the cores; which worker carries which stage."""

import pytest

from engines.errors import UnsupportedByEngine
from engines.native.boot import choose_max_model_len
from engines.native.messages import StageSpec
from engines.native.options import NativeOptions, micro_batches_for, threads_per_stage
from engines.native.specs import specs_of
from planner.layout import pipeline_of


def options(max_micro_batches: int = 0) -> NativeOptions:
    return NativeOptions(
        model_directory="/m", device_ids=("cpu:0",), device_memory_bytes=1, max_micro_batches=max_micro_batches
    )


@pytest.mark.parametrize(
    ("configured", "stages", "cores", "expected"),
    [
        (0, 1, 8, 1),
        (0, 4, 8, 4),
        (0, 8, 2, 2),
        (0, 3, 0, 1),
        (5, 8, 2, 5),  # what is configured goes before the cores
        (5, 3, 8, 3),  # but more than stages are never of use
    ],
)
def test_micro_batches(configured: int, stages: int, cores: int, expected: int) -> None:
    assert micro_batches_for(options(configured), num_stages=stages, cores=cores) == expected


@pytest.mark.parametrize(("stages", "threads", "expected"), [(1, 8, 8), (2, 8, 4), (3, 8, 2), (8, 2, 1), (1, 1, 1)])
def test_the_threads_of_all_stages_stay_within_the_cores(stages: int, threads: int, expected: int) -> None:
    assert threads_per_stage(num_stages=stages, threads=threads) == expected


@pytest.mark.parametrize(
    ("stages", "threads", "per_device", "expected"),
    [(1, 2, 1, 1), (2, 2, 1, 1), (1, 8, 2, 2), (4, 8, 2, 2), (8, 8, 2, 1), (1, 8, 16, 8)],
)
def test_a_stage_has_no_more_threads_than_its_device(stages: int, threads: int, per_device: int, expected: int) -> None:
    """However few stages there are; and all together still stay within the cores."""
    assert threads_per_stage(num_stages=stages, threads=threads, per_device=per_device) == expected


def test_a_stage_becomes_the_role_of_its_worker() -> None:
    pipeline = pipeline_of(device_ids=("cpu:5", "cpu:0", "cpu:3"), cuts=[1, 4], num_decoders=6)
    specs = specs_of(pipeline, {"cpu:0": 0, "cpu:3": 1, "cpu:5": 2})
    assert list(specs.items()) == [
        (2, StageSpec(first_decoder=0, end_decoder=1, is_first=True, is_last=False, next_worker=0)),
        (0, StageSpec(first_decoder=1, end_decoder=4, is_first=False, is_last=False, next_worker=1)),
        (1, StageSpec(first_decoder=4, end_decoder=6, is_first=False, is_last=True, next_worker=-1)),
    ]


def test_one_stage_is_first_and_last() -> None:
    pipeline = pipeline_of(device_ids=("cpu:0",), cuts=[], num_decoders=6)
    (spec,) = specs_of(pipeline, {"cpu:0": 0}).values()
    assert (spec.is_first, spec.is_last, spec.next_worker) == (True, True, -1)


def test_the_longest_sequence_is_what_every_layout_can_hold_unless_more_is_configured() -> None:
    def longest(**values: object) -> int:
        options = NativeOptions(model_directory="", device_ids=("cpu:0",), device_memory_bytes=1, **values)  # type: ignore[arg-type]
        return choose_max_model_len(options, 2048, kv_blocks=40, least_blocks=10)

    assert longest(kv_device_bytes=1 << 20) == 160
    assert longest(kv_device_bytes=1 << 20, max_model_len=600) == 600
    with pytest.raises(UnsupportedByEngine, match="the 640 tokens of the KV cache: raise kv_cache_per_device"):
        longest(kv_device_bytes=1 << 20, max_model_len=641)
    with pytest.raises(UnsupportedByEngine, match=r"raise kv_cache$"):
        longest(max_model_len=641)
