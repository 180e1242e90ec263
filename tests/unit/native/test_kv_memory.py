"""The KV cache of one worker: memory comes with the first write and goes when a decoder leaves."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.native.kv_bound import KvBound
from engines.native.kv_memory import KVMemory
from engines.native.messages import BoundKv

NUM_SLOTS = 256
HALF_BYTES = NUM_SLOTS * 2 * 32 * 4  # keys or values of one decoder in float32


def memory(dtype: torch.dtype = torch.float32) -> KVMemory:
    return KVMemory(num_decoders=4, num_slots=NUM_SLOTS, num_kv_heads=2, head_dim=32, dtype=dtype)


def fill(kv: KVMemory, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*kv.keys, *kv.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def mapped(kv: KVMemory) -> list[int]:
    return [kv.mapped_bytes(decoder) for decoder in range(4)]


def test_shapes_are_slots_heads_dim() -> None:
    kv = memory(torch.bfloat16)
    assert {t.shape for t in (*kv.keys, *kv.values)} == {(NUM_SLOTS, 2, 32)}
    assert (kv.row_bytes, kv.num_slots) == (128, NUM_SLOTS)


def test_nothing_is_mapped_before_it_is_written() -> None:
    kv = memory()
    assert mapped(kv) == [0, 0, 0, 0]
    kv.keys[2][:1] = 1.0
    assert mapped(kv) == [0, 0, mmap.PAGESIZE, 0]


def test_its_pages_are_small_ones_also_where_the_kernel_would_make_them_huge() -> None:
    kv = memory()
    address, flags = kv.keys[0].data_ptr(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            is_here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_here and line.startswith("VmFlags:"):
            flags = line
    assert "nh" in flags.split()


def test_release_gives_all_of_one_decoder_back_and_nothing_else() -> None:
    kv = memory()
    fill(kv)
    assert mapped(kv) == [2 * HALF_BYTES] * 4
    before = kv.keys[2].clone()
    assert kv.release(1) == 2 * HALF_BYTES
    assert mapped(kv) == [2 * HALF_BYTES, 0, 2 * HALF_BYTES, 2 * HALF_BYTES]
    assert torch.equal(kv.keys[2], before)
    assert kv.release(1) == 0


def test_a_released_decoder_can_be_written_again() -> None:
    kv = memory()
    fill(kv)
    kv.release(0)
    kv.values[0][5] = 3.0
    assert kv.values[0][5].eq(3.0).all()
    assert kv.values[0][6].eq(0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_slots_travel_between_workers_bit_by_bit(dtype: torch.dtype) -> None:
    source, target = memory(dtype), memory(dtype)
    fill(source)
    slots, decoders = np.array([200, 3, 4, 77], dtype=np.int32), [3, 1]
    staging = memoryview(bytearray(2 * len(decoders) * len(slots) * source.row_bytes + 64))
    source.read_into(decoders, slots, staging)
    target.write_from(decoders, slots, staging)
    for decoder in decoders:
        for ours, theirs in ((source.keys, target.keys), (source.values, target.values)):
            assert torch.equal(ours[decoder][slots], theirs[decoder][slots])
    assert (target.mapped_bytes(0), target.mapped_bytes(2)) == (0, 0)
    others = [slot for slot in range(NUM_SLOTS) if slot not in slots.tolist()]
    assert target.keys[1][others].eq(0).all()


def test_values_that_are_not_numbers_travel_too() -> None:
    """Copies are of bytes: also where a comparison of floats would fail or a conversion would change them."""
    source, target = memory(torch.bfloat16), memory(torch.bfloat16)
    source.keys[0].view(torch.int16).copy_(torch.arange(NUM_SLOTS * 64).view(NUM_SLOTS, 2, 32) * 4)
    staging = memoryview(bytearray(2 * NUM_SLOTS * source.row_bytes))
    source.read_into([0], np.arange(NUM_SLOTS, dtype=np.int32), staging)
    target.write_from([0], np.arange(NUM_SLOTS, dtype=np.int32), staging)
    assert target.slot_bytes(0, 0, NUM_SLOTS) == source.slot_bytes(0, 0, NUM_SLOTS)


def test_slot_bytes_are_keys_then_values() -> None:
    kv = memory()
    fill(kv)
    expected = kv.keys[3][5:9].numpy().tobytes() + kv.values[3][5:9].numpy().tobytes()
    assert kv.slot_bytes(3, 5, 9) == expected


def test_a_half_that_does_not_fill_its_last_page_stays_apart() -> None:
    kv = KVMemory(num_decoders=2, num_slots=3, num_kv_heads=1, head_dim=5, dtype=torch.float32)
    fill(kv)
    before = [t.clone() for t in (kv.keys[1], kv.values[1])]
    kv.release(0)
    assert mapped_pair(kv) == [0, 2 * mmap.PAGESIZE]
    assert torch.equal(kv.keys[1], before[0])
    assert torch.equal(kv.values[1], before[1])


def mapped_pair(kv: KVMemory) -> list[int]:
    return [kv.mapped_bytes(decoder) for decoder in range(2)]


def test_pages_above_a_slot_are_given_back_and_those_below_it_stay() -> None:
    kv = memory()
    fill(kv)
    before = [kv.keys[1][:64].clone(), kv.values[1][:64].clone()]
    page_slots = mmap.PAGESIZE // kv.row_bytes
    kept = -(-64 // page_slots) * mmap.PAGESIZE
    assert kv.bound(1, 64) == 2 * (HALF_BYTES - kept)
    assert mapped(kv) == [2 * HALF_BYTES, 2 * kept, 2 * HALF_BYTES, 2 * HALF_BYTES]
    assert torch.equal(kv.keys[1][:64], before[0])
    assert torch.equal(kv.values[1][:64], before[1])
    assert kv.bound(1, 64) == 0
    assert kv.bound(2, NUM_SLOTS) == 0


def test_slots_are_copied_to_others_of_the_same_decoder() -> None:
    kv = memory()
    fill(kv)
    before = kv.keys[2].clone()
    kv.move_slots([2], np.array([200, 201], dtype=np.int32), np.array([3, 4], dtype=np.int32))
    assert torch.equal(kv.keys[2][3:5], before[200:202])
    assert torch.equal(kv.keys[2][5:], before[5:])


def test_a_slice_of_giving_back_goes_by_the_bound_of_its_moment() -> None:
    kv = memory()
    bound, told = KvBound(kv, kv_block_tokens=16, end_slot=NUM_SLOTS), list[int]()
    fill(kv)
    late = list(bound.slices(BoundKv(ticket=1, end_slot=64), [0, 1], tell=told.append))
    late[0]()
    assert mapped(kv)[0] < 2 * HALF_BYTES
    for piece in bound.slices(BoundKv(ticket=2, end_slot=NUM_SLOTS), [0, 1], tell=told.append):
        piece()
    for piece in late[1:]:
        piece()
    assert mapped(kv)[1] == 2 * HALF_BYTES
    assert told[0] == 0
    assert told[1] > 0
