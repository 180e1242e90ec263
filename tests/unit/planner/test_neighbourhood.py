"""Others take and free memory: what the KV cache does about it, on a clock of the test's own."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

from planner.neighbourhood import (
    Change,
    NeighbourConstants,
    NeighbourState,
    Pool,
    PoolShare,
    ReplicaKv,
    Verb,
    decide,
    missing_bytes,
)
from topology.units import MIB

CONSTANTS = NeighbourConstants(keep_free_bytes=100 * MIB)
HOST = "the host"


def on(*pools: str, mapped: int = 0, block_bytes: float = MIB) -> tuple[PoolShare, ...]:
    return tuple(PoolShare(pool=pool, block_bytes=block_bytes, mapped_bytes=mapped) for pool in pools)


FIRST = ReplicaKv(number=1, blocks=1000, least_blocks=100, most_blocks=1000, shares=on(HOST))


@dataclass
class Story:
    """Replicas that do what is decided, and pools that a test fills."""

    replicas: list[ReplicaKv]
    free: dict[str, int | None]
    shared: set[str] = field(default_factory=set)
    now_s: float = 0.0
    state: NeighbourState = field(default_factory=NeighbourState)
    done: list[tuple[float, Change]] = field(default_factory=list)

    def go_on(self, seconds: float, *, step_s: float = 2.0) -> list[Change]:
        """Look every two seconds and carry out; return what was decided."""
        before = len(self.done)
        for _ in range(round(seconds / step_s)):
            pools = [
                Pool(name=name, free_bytes=free, is_shared=name in self.shared) for name, free in self.free.items()
            ]
            self.state, changes = decide(self.state, self.replicas, pools, now_s=self.now_s, constants=CONSTANTS)
            for change in changes:
                self.done.append((self.now_s, change))
                self.replicas = [
                    replace(each, blocks=change.blocks) if each.number == change.number else each
                    for each in self.replicas
                ]
            self.now_s += step_s
        return [change for _, change in self.done[before:]]

    @property
    def blocks(self) -> list[int]:
        return [each.blocks for each in self.replicas]


def test_with_room_for_all_of_it_nothing_happens() -> None:
    story = Story([FIRST], {HOST: 1100 * MIB})
    assert story.go_on(600) == []


def test_it_shrinks_at_once_to_what_fits_and_once() -> None:
    story = Story([FIRST], {HOST: 600 * MIB})
    [change] = story.go_on(60)
    assert story.done[0][0] == 0.0
    assert change == Change(
        number=1,
        verb=Verb.SHRINK,
        blocks=450,  # 500 fit, less a tenth
        reason="600 MiB are free on the host, where 100 MiB are to stay free, for 500 KV blocks",
    )


def test_what_is_mapped_counts_as_there() -> None:
    story = Story([replace(FIRST, shares=on(HOST, mapped=900 * MIB))], {HOST: 200 * MIB})
    assert story.go_on(60) == []
    story.free[HOST] = 90 * MIB  # ten more than are to stay free are gone
    [change] = story.go_on(2)
    assert (change.verb, change.blocks) == (Verb.SHRINK, 801)


def test_it_grows_again_only_after_the_memory_has_been_free_for_a_while() -> None:
    story = Story([FIRST], {HOST: 600 * MIB})
    story.go_on(10)
    story.free[HOST] = 2000 * MIB
    assert story.go_on(28) == []
    story.free[HOST] = 600 * MIB  # taken again meanwhile: it begins anew
    story.go_on(2)
    story.free[HOST] = 2000 * MIB
    assert story.go_on(30) == []
    [change] = story.go_on(4)
    assert (change.verb, change.blocks) == (Verb.GROW, 1000)
    assert "are free on the host" in change.reason


def test_it_never_shrinks_below_the_longest_request_and_says_nothing_twice() -> None:
    story = Story([FIRST], {HOST: 50 * MIB})
    assert [change.blocks for change in story.go_on(600)] == [100]
    story.free[HOST] = 0
    assert story.go_on(600) == []


def test_memory_that_comes_and_goes_changes_it_at_most_every_half_minute() -> None:
    """A neighbour that takes and frees 600 MiB every 20 s: one shrink, and then it stays small."""
    story = Story([FIRST], {HOST: 1200 * MIB})
    for _ in range(30):
        story.free[HOST] = 600 * MIB
        story.go_on(20)
        story.free[HOST] = 1200 * MIB
        story.go_on(20)
    assert [change.verb for _, change in story.done] == [Verb.SHRINK]


def test_it_grows_to_what_was_free_all_the_while_and_not_to_what_somebody_has_just_freed() -> None:
    """A neighbour takes and frees 600 MiB every 20 s, and there is some room also while it has them."""
    story = Story([FIRST], {HOST: 400 * MIB})
    story.go_on(10)
    for _ in range(30):
        story.free[HOST] = 600 * MIB
        story.go_on(20)
        story.free[HOST] = 1200 * MIB
        story.go_on(20)
    assert [(at_s, change.verb, change.blocks) for at_s, change in story.done] == [
        (0.0, Verb.SHRINK, 270),
        (40.0, Verb.GROW, 450),
    ]


def test_memory_that_comes_back_step_by_step_is_taken_every_half_minute() -> None:
    story = Story([FIRST], {HOST: 150 * MIB})
    story.go_on(10)
    for _ in range(60):
        story.free[HOST] = (story.free[HOST] or 0) + 16 * MIB
        story.go_on(2)
    story.go_on(120)
    grown = [(at_s, change.blocks) for at_s, change in story.done if change.verb is Verb.GROW]
    assert [blocks for _, blocks in grown] == sorted({blocks for _, blocks in grown})
    assert all(later - at_s >= 30.0 for (at_s, _), (later, _) in pairwise(grown))
    assert (story.blocks, len(grown)) == ([1000], 5)


def test_what_the_kv_caches_of_other_models_may_yet_take_is_not_free() -> None:
    other = replace(FIRST, most_blocks=500, blocks=500, shares=on(HOST, mapped=100 * MIB))
    pools = [Pool(name=HOST, free_bytes=750 * MIB)]
    _, changes = decide(NeighbourState(), [FIRST], pools, now_s=0.0, constants=CONSTANTS, beside=[other])
    assert [(change.number, change.blocks) for change in changes] == [(1, 450)]  # half of the most, less a tenth


def test_a_slow_leak_is_followed_in_steps() -> None:
    story = Story([FIRST], {HOST: 1100 * MIB})
    for _ in range(1000):
        free = story.free[HOST]
        assert free is not None
        story.free[HOST] = free - MIB
        story.go_on(2)
        assert story.blocks[0] == 100 or story.blocks[0] * MIB <= free - 101 * MIB
    assert len(story.done) < 30


def test_replicas_on_the_same_memory_give_way_in_proportion() -> None:
    second = replace(FIRST, number=2, blocks=500, most_blocks=500)
    story = Story([FIRST, second], {HOST: 850 * MIB})
    story.go_on(60)
    assert story.blocks == [450, 225]


def test_the_tightest_of_several_devices_decides() -> None:
    story = Story([replace(FIRST, shares=on("gpu-a", "gpu-b", block_bytes=MIB / 2))], {"gpu-a": 0, "gpu-b": 0})
    story.free = {"gpu-a": 10_000 * MIB, "gpu-b": 350 * MIB}
    [change] = story.go_on(60)
    assert (change.blocks, "gpu-b" in change.reason) == (450, True)


def test_layers_move_off_a_device_that_others_fill_where_another_has_room() -> None:
    fixed = replace(FIRST, least_blocks=1000, shares=on("gpu-a", "gpu-b", mapped=1000 * MIB))
    story = Story([fixed], {"gpu-a": 5000 * MIB, "gpu-b": 50 * MIB})
    assert story.go_on(60) == []  # nobody else is there: it is our own doing
    story.shared = {"gpu-b"}
    story.now_s, story.state = 0.0, NeighbourState()
    assert story.go_on(10) == []
    changes = story.go_on(610)
    assert [change.verb for change in changes] == [Verb.MOVE] * 3  # it is asked again where that changed nothing
    assert [at_s for at_s, _ in story.done] == [10.0, 310.0, 610.0]
    assert changes[0].reason.endswith("and the KV cache cannot shrink further: layers move")


def test_layers_stay_where_no_device_has_room_or_there_is_only_one() -> None:
    fixed = replace(FIRST, least_blocks=1000, shares=on("gpu-a", "gpu-b", mapped=1000 * MIB))
    story = Story([fixed], {"gpu-a": 150 * MIB, "gpu-b": 50 * MIB}, shared={"gpu-b"})
    [told] = story.go_on(60)
    assert (told.verb, told.reason) == (
        Verb.SHORT,
        "50 MiB are free on gpu-b, where 100 MiB are to stay free, and the KV cache cannot shrink further: layers "
        "cannot move, as no other device has more than 200 MiB free: 150 MiB on gpu-a",
    )
    alone = Story([replace(FIRST, least_blocks=1000)], {HOST: 50 * MIB}, shared={HOST})
    assert [change.reason.rpartition(": ")[2] for change in alone.go_on(60)] == [
        "layers cannot move, as there is no other device"
    ]
    alone.free[HOST] = 2000 * MIB
    assert alone.go_on(60) == []
    alone.free[HOST] = 50 * MIB  # another shortage
    assert [change.verb for change in alone.go_on(60)] == [Verb.SHORT]


def test_layers_that_have_moved_lately_stay_and_that_is_told() -> None:
    fixed = replace(FIRST, least_blocks=1000, shares=on("gpu-a", "gpu-b", mapped=1000 * MIB))
    story = Story([fixed], {"gpu-a": 5000 * MIB, "gpu-b": 50 * MIB}, shared={"gpu-a", "gpu-b"})
    assert [change.verb for change in story.go_on(14)] == [Verb.MOVE]
    story.free = {"gpu-a": 5000 * MIB, "gpu-b": 5000 * MIB}
    assert story.go_on(6) == []
    story.free["gpu-a"] = 40 * MIB
    [told] = story.go_on(60)
    assert told.reason.endswith("layers cannot move, as they have 20 s ago, and do so again in 280 s at the earliest")


def test_what_is_not_known_is_no_reason_to_do_anything() -> None:
    story = Story([FIRST], {HOST: None})
    assert story.go_on(60) == []
    assert Story([replace(FIRST, shares=())], {HOST: 0}).go_on(60) == []


def test_what_is_missing_is_what_kv_caches_may_yet_take_and_what_is_to_stay_free() -> None:
    mapped = replace(FIRST, shares=on(HOST, mapped=900 * MIB))
    assert missing_bytes([mapped], Pool(name=HOST, free_bytes=150 * MIB), CONSTANTS) == 50 * MIB
    assert missing_bytes([mapped], Pool(name=HOST, free_bytes=200 * MIB), CONSTANTS) == 0
    assert missing_bytes([], Pool(name=HOST, free_bytes=60 * MIB), CONSTANTS) == 40 * MIB
    assert missing_bytes([mapped], Pool(name=HOST, free_bytes=None), CONSTANTS) == 0
