"""What to do when others take or free memory: the KV cache shrinks or grows, or layers move. Pure: no I/O, no clock.

    short of memory --> parameters that no stage has are given up, at once
                        still short after that --> shrink, at once  (never below the longest request)
                        still short after that, on a device with other tenants: another has room --> move layers
                                                                                none has         --> tell, once
    room again, for ``grow_after_s`` --> grow, to what there was room for all the while

A KV cache takes memory as it is written, up to its number of KV blocks. So what counts is what it *may* take: that has
to be there, and ``keep_free_bytes`` besides. Several replicas on the same memory give way in proportion, those of other
models, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import inf

from topology.units import format_bytes


class Verb(Enum):
    SHRINK = "shrink"
    GROW = "grow"
    MOVE = "move"  # a layout for what is free now, of as many stages
    SHORT = "short"  # nothing can be done, so somebody should know


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Memory that stages share with others: that of one GPU, or of a host that has CPU devices.

    Attributes:
        free_bytes: What everybody may still take; None: not known.
        is_shared: Whether another tenant is known to be there, so that layers may have to leave it.
        is_host: Whether it is the memory of the host, which everything there shares.
    """

    name: str
    free_bytes: int | None
    is_shared: bool = False
    is_host: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolShare:
    """What the KV cache of one replica takes of one pool: per KV block, and what is backed by memory now."""

    pool: str
    block_bytes: float
    mapped_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaKv:
    """The KV cache of one replica. An engine that cannot change its KV cache has ``blocks`` as least and as most."""

    number: int
    blocks: int
    least_blocks: int
    most_blocks: int
    shares: tuple[PoolShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourConstants:
    """Each with its reason.

    Attributes:
        keep_free_bytes: Left to others: what they take between two looks must not be what is missing.
        slack: So much less than fits is taken, so that not every look changes something.
        grow_after_s: What is taken must have been free for so long: whoever frees some often takes it again.
        move_after_s: Layers move only where it has been short for so long: that costs more than it takes to look again.
        move_again_s: And not again within this time.
    """

    keep_free_bytes: int
    slack: float = 0.1
    grow_after_s: float = 30.0
    move_after_s: float = 10.0
    move_again_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Since when there has been room for more KV blocks, and for how many all the while."""

    since_s: float
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighbourState:
    """What is remembered of each replica: what room it has had, since when it is short, when its layers last moved, and
    whether it was told that nothing can be done about a shortage that lasts."""

    rooms: Mapping[int, Room] = field(default_factory=dict)
    short_since_s: Mapping[int, float] = field(default_factory=dict)
    moved_s: Mapping[int, float] = field(default_factory=dict)
    told: frozenset[int] = frozenset()

    def without_move(self, number: int) -> "NeighbourState":
        """Return the state in which layers of a replica did not move: that could not be begun, so it is asked again."""
        return replace(self, moved_s={each: at_s for each, at_s in self.moved_s.items() if each != number})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing to do for one replica, with its reason in words. ``blocks``: the new number of KV blocks."""

    number: int
    verb: Verb
    blocks: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """The pool that leaves a replica the fewest KV blocks: the number that ``fits``, which may be below zero."""

    pool: Pool
    fits: float


def decide(
    state: NeighbourState,
    replicas: Sequence[ReplicaKv],
    pools: Sequence[Pool],
    *,
    now_s: float,
    constants: NeighbourConstants,
    beside: Sequence[ReplicaKv] = (),
) -> tuple[NeighbourState, tuple[Change, ...]]:
    """Return the next state, and what to do for which replica: nothing for most, most of the time.

    1. More KV blocks than fit: fewer at once.
    2. As few as can be, and still more than fit: layers move, where others have taken the memory of one device and
       another one has room; where nothing can be done, that is told once.
    3. Room for more, for long enough: as many more as there was room for all that time.

    Args:
        beside: The KV caches of other models on the same memory, which give way by themselves.
    """
    known = {pool.name: pool for pool in pools if pool.free_bytes is not None}
    ratios = {name: _ratio(pool, (*replicas, *beside), constants) for name, pool in known.items()}
    rooms: dict[int, Room] = {}
    short: dict[int, float] = {}
    moved = {number: at_s for number, at_s in state.moved_s.items() if now_s - at_s < constants.move_again_s}
    changes: list[Change | None] = []
    for replica in replicas:
        tightest = min((s.pool for s in replica.shares if s.pool in known), key=lambda name: ratios[name], default=None)
        if tightest is None:
            continue
        number, bound = replica.number, _Bound(pool=known[tightest], fits=ratios[tightest] * replica.most_blocks)
        if bound.fits < replica.blocks:
            change = _fewer(replica, bound, constants)  # 1
            if bound.fits < replica.least_blocks:
                short[number] = state.short_since_s.get(number, now_s)
                if change is None and now_s - short[number] >= constants.move_after_s:  # 2
                    stuck = _why_not(bound.pool, known.values(), moved.get(number), now_s=now_s, constants=constants)
                    # A move that was asked for meanwhile is under way, or it was told why it is not.
                    is_told = number in state.told or short[number] <= moved.get(number, -inf)
                    change = _moving_or_short(replica, bound.pool, stuck, is_told, constants)
            changes.append(change)
        elif (change := _more(replica, bound, constants)) is not None:
            room = rooms[number] = _room(state, replica, change.blocks, now_s=now_s)
            is_lasting = now_s - room.since_s >= constants.grow_after_s  # 3
            changes.append(replace(change, blocks=room.blocks) if is_lasting else None)
    made = tuple(each for each in changes if each is not None)
    told = (state.told & short.keys()) | {each.number for each in made if each.verb is Verb.SHORT}
    moved |= {each.number: now_s for each in made if each.verb is Verb.MOVE}
    return NeighbourState(rooms=rooms, short_since_s=short, moved_s=moved, told=frozenset(told)), made


def _room(state: NeighbourState, replica: ReplicaKv, blocks: int, *, now_s: float) -> Room:
    """Return what room there has been for a replica that could have ``blocks`` now; what it has taken is none."""
    before = state.rooms.get(replica.number)
    if before is None or before.blocks <= replica.blocks:
        return Room(since_s=now_s, blocks=blocks)
    return replace(before, blocks=min(before.blocks, blocks))


def _ratio(pool: Pool, replicas: Sequence[ReplicaKv], constants: NeighbourConstants) -> float:
    """Return how much of their largest KV caches the replicas may have in a pool; negative: not even what is mapped."""
    assert pool.free_bytes is not None
    shares = [(each, share) for each in replicas for share in each.shares if share.pool == pool.name]
    most = sum(each.most_blocks * share.block_bytes for each, share in shares)
    mapped = sum(share.mapped_bytes for _, share in shares)
    return (mapped + pool.free_bytes - constants.keep_free_bytes) / most if most else 1.0


def missing_bytes(replicas: Sequence[ReplicaKv], pool: Pool, constants: NeighbourConstants) -> int:
    """Return what others would have to give up in a pool for all KV caches to have all that they may take."""
    if pool.free_bytes is None:
        return 0
    shares = [(each, share) for each in replicas for share in each.shares if share.pool == pool.name]
    may_take = sum(each.most_blocks * share.block_bytes - share.mapped_bytes for each, share in shares)
    return max(0, constants.keep_free_bytes + int(may_take) - pool.free_bytes)


def _target(replica: ReplicaKv, bound: _Bound, constants: NeighbourConstants) -> int:
    """Return the number of KV blocks to have: all where all fit, else what fits less some slack."""
    if bound.fits >= replica.most_blocks:
        return replica.most_blocks
    return max(replica.least_blocks, int(bound.fits * (1.0 - constants.slack)))


def _fewer(replica: ReplicaKv, bound: _Bound, constants: NeighbourConstants) -> Change | None:
    blocks = _target(replica, bound, constants)
    if blocks >= replica.blocks:
        return None
    words = f"{_left(bound.pool, constants)}, for {max(0, int(bound.fits))} KV blocks"
    return Change(number=replica.number, verb=Verb.SHRINK, blocks=blocks, reason=words)


def _more(replica: ReplicaKv, bound: _Bound, constants: NeighbourConstants) -> Change | None:
    blocks = _target(replica, bound, constants)
    is_worth_it = blocks == replica.most_blocks or blocks >= replica.blocks * (1.0 + constants.slack)
    if blocks <= replica.blocks or not is_worth_it:
        return None
    words = f"{_left(bound.pool, constants)}, and room for this since {constants.grow_after_s:g} s at least"
    return Change(number=replica.number, verb=Verb.GROW, blocks=blocks, reason=words)


def _why_not(
    pool: Pool, pools: Iterable[Pool], moved_s: float | None, *, now_s: float, constants: NeighbourConstants
) -> str:
    """Return why layers do not move off a device; empty where they may: others have taken it, and another has room."""
    others = [other for other in pools if other.name != pool.name]
    needed = 2 * constants.keep_free_bytes
    if not others or pool.is_host:
        return "there is no other device"
    if not any((other.free_bytes or 0) > needed for other in others):
        free = ", ".join(f"{format_bytes(max(0, other.free_bytes or 0))} on {other.name}" for other in others)
        return f"no other device has more than {format_bytes(needed)} free: {free}"
    if not pool.is_shared:
        return "nobody else is there"
    if moved_s is None:
        return ""
    left_s = constants.move_again_s - (now_s - moved_s)
    return f"they have {now_s - moved_s:.0f} s ago, and do so again in {left_s:.0f} s at the earliest"


def _moving_or_short(
    replica: ReplicaKv, pool: Pool, stuck: str, is_told: bool, constants: NeighbourConstants
) -> Change | None:
    """Return the move; where it is ``stuck`` instead, that, once, unless it is our own doing."""
    if stuck and (is_told or not (pool.is_shared or pool.is_host)):
        return None
    words = f"{_left(pool, constants)}, and the KV cache cannot shrink further: layers"
    reason = f"{words} cannot move, as {stuck}" if stuck else f"{words} move"
    verb = Verb.SHORT if stuck else Verb.MOVE
    return Change(number=replica.number, verb=verb, blocks=replica.blocks, reason=reason)


def _left(pool: Pool, constants: NeighbourConstants) -> str:
    free, keep = format_bytes(max(0, pool.free_bytes or 0)), format_bytes(constants.keep_free_bytes)
    return f"{free} are free on {pool.name}, where {keep} are to stay free"
