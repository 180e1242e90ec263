"""Stages on a device with memory of its own: where things lie by torch's meta device, what they are by the CPU."""

import numpy as np
import pytest
import torch

from engines.native.compute import STAND_IN, Compute, open_compute
from engines.native.kv_bound import KvBound
from engines.native.kv_device import DeviceKV
from engines.native.kv_memory import KVMemory
from engines.native.messages import BoundKv, RunStep
from tests.support.family_checkpoints import KINDS, make_family
from tests.unit.native.stages import NEW_TOKENS, PROMPT, Stages, expected_tokens, int32

NUM_SLOTS = 64
META = Compute(device=torch.device("meta"), own_memory=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_gives_the_tokens_of_transformers_while_decoders_move(kind: str) -> None:
    directory = make_family(kind)
    stages = Stages(directory, None, cuts=(2,), compute=open_compute(STAND_IN))
    tokens = stages.decode([stages.prefill(chunk=20)], 4)
    stages.adopt((1,))
    stages.move_kv(source=0, target=1, decoders=[1], num_tokens=len(PROMPT) + 4)
    assert tuple(stages.decode(tokens, NEW_TOKENS - 5)) == expected_tokens(directory)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"mixtral", "qwen3_moe"}))
def test_nothing_that_a_stage_computes_with_is_left_on_the_host(kind: str) -> None:
    """Operations refuse tensors of two devices; meta tensors have no data. Routers of mixtures look at theirs."""
    stages = Stages(make_family(kind), None, compute=META)
    runner, spec = stages.workers[0].runner, stages.specs[0]
    message = RunStep(
        step_id=1,
        generation=1,
        rows=int32([0, 1]),
        starts=int32([0, 3]),
        counts=int32([5, 1]),
        tokens=int32(range(20, 26)),
        sampled=int32([0]),
        draws=[],
        logprobs=False,
    )
    with torch.inference_mode():
        hidden, _ = runner.forward(spec, message, None)
        logits = runner._family.head(hidden[0, :1])
    assert hidden.device.type == logits.device.type == "meta"


def test_its_weights_are_copies() -> None:
    stages = Stages(make_family("llama"), None, compute=open_compute(STAND_IN))
    layers = stages.workers[0].layers
    first, second = (layers.read("0").tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not {each.data_ptr() for each in first.values()} & {each.data_ptr() for each in second.values()}


def device_kv(end_slot: int = NUM_SLOTS) -> DeviceKV:
    return DeviceKV(
        torch.device("cpu"),
        num_decoders=3,
        end_slot=lambda: end_slot,
        num_kv_heads=2,
        head_dim=4,
        dtype=torch.bfloat16,
    )


def filled(kv: DeviceKV | KVMemory) -> DeviceKV | KVMemory:
    generator = torch.Generator().manual_seed(0)
    for decoder in (0, 2):
        kv.hold(decoder)
        for half in (kv.keys[decoder], kv.values[decoder]):
            half.copy_(torch.randn(half.shape, generator=generator))
    return kv


def test_it_copies_the_bytes_that_a_mapped_cache_copies() -> None:
    """In either direction, and moved, and as they are compared at a commit."""
    mapped = KVMemory(num_decoders=3, num_slots=NUM_SLOTS, num_kv_heads=2, head_dim=4, dtype=torch.bfloat16)
    slots = np.array([3, 60, 7], dtype=np.int32)
    taken = []
    for kv in (filled(device_kv()), filled(mapped)):
        kv.move_slots([0, 2], np.array([60], dtype=np.int32), np.array([9], dtype=np.int32))
        staging = bytearray(4 * 3 * kv.row_bytes)
        kv.read_into([0, 2], slots, memoryview(staging))
        kv.write_from([2, 0], slots[::-1].copy(), memoryview(staging))
        taken.append((bytes(staging), kv.slot_bytes(0, 0, 20), kv.slot_bytes(2, 50, 64)))
    assert taken[0] == taken[1]


def test_memory_is_there_while_a_decoder_is_held_and_as_large_as_the_bound() -> None:
    kv = filled(device_kv())
    whole = 2 * NUM_SLOTS * kv.row_bytes
    assert [kv.mapped_bytes(decoder) for decoder in range(3)] == [whole, 0, whole]
    before = kv.keys[0].clone()
    kv_bound, told = KvBound(kv, kv_block_tokens=16, end_slot=NUM_SLOTS), list[int]()
    for end_slot in (32, 48):
        for piece in kv_bound.slices(BoundKv(ticket=1, end_slot=end_slot), [0, 2], tell=told.append):
            piece()
        assert kv.mapped_bytes(0) == 2 * end_slot * kv.row_bytes
        assert torch.equal(kv.keys[0][:32], before[:32])
    assert told == [whole, 0]  # a half of each of two decoders, and nothing
    assert kv.release(0) == 2 * 48 * kv.row_bytes
    assert (kv.mapped_bytes(0), kv.release(0)) == (0, 0)
