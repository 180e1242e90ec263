"""What a handover copies: every decoder that moves, every slot that is needed, each once."""

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from engines.native.transfer import DirtySlots, Route, pieces_of, routes_between
from planner.layout import Pipeline, pipeline_of

DEVICES = tuple(f"cpu:{index}" for index in range(8))
WORKER_OF = {device: index for index, device in enumerate(DEVICES)}


def random_pipeline(rng: random.Random, num_decoders: int) -> Pipeline:
    stages = rng.randint(1, min(num_decoders, len(DEVICES)))
    cuts = sorted(rng.sample(range(1, num_decoders), stages - 1))
    return pipeline_of(device_ids=rng.sample(DEVICES, stages), cuts=cuts, num_decoders=num_decoders)


def worker_with(pipeline: Pipeline, decoder: int) -> int:
    return WORKER_OF[pipeline.stage_of(decoder).device_ids[0]]


def slots_of(slots: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(slots, dtype=np.int64)


@pytest.mark.parametrize("seed", range(40))
def test_routes_take_each_decoder_that_moves_from_where_it_is_to_where_it_goes(seed: int) -> None:
    rng = random.Random(seed)
    num_decoders = rng.randint(1, 12)
    current, target = random_pipeline(rng, num_decoders), random_pipeline(rng, num_decoders)
    routes = routes_between(current, target, WORKER_OF)
    moved = {decoder: (route.source, route.target) for route in routes for decoder in route.decoders}
    for decoder in range(num_decoders):
        source, destination = worker_with(current, decoder), worker_with(target, decoder)
        assert moved.get(decoder) == (None if source == destination else (source, destination))
    assert sum(len(route.decoders) for route in routes) == len(moved)
    assert len({(route.source, route.target) for route in routes}) == len(routes)


def test_the_same_layout_has_no_routes() -> None:
    pipeline = pipeline_of(device_ids=DEVICES[:2], cuts=[3], num_decoders=8)
    assert routes_between(pipeline, pipeline, WORKER_OF) == ()


def test_a_moved_cut_is_one_route() -> None:
    before, after = (pipeline_of(device_ids=DEVICES[:2], cuts=[cut], num_decoders=8) for cut in (3, 5))
    assert routes_between(before, after, WORKER_OF) == (Route(source=1, target=0, decoders=(3, 4)),)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_cover_every_slot_of_every_decoder_once_within_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    route = Route(source=0, target=1, decoders=tuple(sorted(rng.sample(range(20), rng.randint(1, 9)))))
    slots = slots_of(sorted(rng.sample(range(200), rng.randint(0, 60))))
    decoder_slot_bytes = rng.choice([1, 8, 100])
    slice_bytes = rng.choice([100, 350, 1000, 100_000])
    pieces = list(pieces_of(route, slots, decoder_slot_bytes=decoder_slot_bytes, slice_bytes=slice_bytes))
    copied = Counter((decoder, int(slot)) for piece in pieces for decoder in piece.decoders for slot in piece.slots)
    assert copied == Counter((decoder, int(slot)) for decoder in route.decoders for slot in slots)
    assert all(len(piece.decoders) * len(piece.slots) * decoder_slot_bytes <= slice_bytes for piece in pieces)
    assert all(piece.route is route and piece.slots.dtype == np.int32 for piece in pieces)


def test_a_slot_larger_than_the_bound_goes_alone() -> None:
    route = Route(source=0, target=1, decoders=(4, 5))
    pieces = list(pieces_of(route, slots_of([7, 9]), decoder_slot_bytes=100, slice_bytes=10))
    assert [(piece.decoders, piece.slots.tolist()) for piece in pieces] == [
        ([4], [7]),
        ([4], [9]),
        ([5], [7]),
        ([5], [9]),
    ]


def test_what_is_live_at_the_start_is_dirty() -> None:
    dirty = DirtySlots(num_slots=10, live=slots_of([2, 5]))
    assert dirty.count == 2
    assert dirty.take(slots_of([2, 5])).tolist() == [2, 5]
    assert dirty.count == 0


def test_what_was_taken_is_clean_until_written_again() -> None:
    dirty = DirtySlots(num_slots=10, live=slots_of([1, 2, 3]))
    dirty.take(slots_of([1, 2, 3]))
    dirty.mark(slots_of([3, 4]))
    dirty.mark(slots_of([4]))
    assert dirty.count == 2
    assert dirty.take(slots_of([1, 2, 3, 4])).tolist() == [3, 4]


def test_what_nobody_needs_any_more_is_left_out_and_forgotten() -> None:
    dirty = DirtySlots(num_slots=10, live=slots_of([1, 2, 3]))
    assert dirty.take(slots_of([3])).tolist() == [3]
    assert dirty.take(slots_of([1, 2, 3])).tolist() == []


def test_no_live_slot_is_nothing_to_send() -> None:
    dirty = DirtySlots(num_slots=10, live=slots_of([]))
    assert (dirty.count, dirty.take(slots_of([])).tolist()) == (0, [])
