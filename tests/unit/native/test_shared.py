"""Shared memory of one engine: areas of their own for each worker, step and buffer, seen by forked processes."""

import os

import pytest

from engines.native.shared import STAGING_BUFFERS, SharedMemory, SharedSizes

SIZES = SharedSizes(
    num_workers=3,
    max_num_seqs=4,
    max_blocks_per_seq=5,
    hidden_bytes_per_token=64,
    max_num_batched_tokens=8,
    outbox_slots=2,
    staging_bytes=1000,
)


def areas(shared: SharedMemory) -> list[memoryview]:
    outboxes = [shared.outbox(worker, step) for worker in range(3) for step in range(2)]
    staging = [shared.staging(worker, buffer) for worker in range(3) for buffer in range(STAGING_BUFFERS)]
    return outboxes + staging


def test_no_two_areas_overlap() -> None:
    shared = SharedMemory(SIZES)
    for number, area in enumerate(areas(shared), start=1):
        area[:] = bytes([number]) * len(area)
    assert [bytes(area) for area in areas(shared)] == [
        bytes([number]) * len(area) for number, area in enumerate(areas(shared), start=1)
    ]
    assert [len(area) for area in areas(shared)] == [8 * 64] * 6 + [1000] * 3 * STAGING_BUFFERS


def test_steps_in_flight_have_outboxes_of_their_own_in_turn() -> None:
    shared = SharedMemory(SIZES)
    shared.outbox(1, 6)[:3] = b"six"
    shared.outbox(1, 7)[:3] = b"7.."
    assert bytes(shared.outbox(1, 6)[:3]) == b"six"
    assert bytes(shared.outbox(1, 8)[:3]) == b"six"  # two slots: step 8 comes after 6


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # the child does next to nothing
def test_a_forked_worker_sees_and_writes_the_same_memory() -> None:
    shared = SharedMemory(SIZES)
    shared.block_table[3, 4] = 77
    pid = os.fork()
    if pid == 0:
        try:
            shared.staging(2, 1)[0] = int(shared.block_table[3, 4])
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert shared.staging(2, 1)[0] == 77
    assert shared.block_table.shape == (4, 5)
