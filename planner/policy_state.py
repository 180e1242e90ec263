"""What the policy remembers between two decisions, what it decides, and its constants: plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from planner.arrivals import Reading
from planner.granularity import ScoreConstants
from planner.scaling import ScaleConstants

Fleet = tuple[int, ...]  # number of stages of each replica that serves, ascending


class Verb(Enum):
    KEEP = "keep"
    CHANGE = "change"  # replicas of ``from_stages`` get ``num_stages``
    UNDO = "undo"  # likewise: the last change did not do what was predicted
    ADD = "add"  # ``count`` replicas of ``num_stages``
    REMOVE = "remove"  # drain ``count`` replicas of ``num_stages``, and end them


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do. ``count``: replicas that it concerns."""

    verb: Verb
    num_stages: int
    from_stages: int = 0
    count: int = 1

    def on(self, fleet: Fleet) -> Fleet:
        """Return the fleet once it is done."""
        left = list(fleet)
        gone = self.num_stages if self.verb is Verb.REMOVE else self.from_stages
        for _ in range(self.count):
            if gone in left:
                left.remove(gone)
            if self.verb is not Verb.REMOVE:
                left.append(self.num_stages)
        return tuple(sorted(left))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one cycle came to: at most one action, with one reason in words and the numbers it rests on."""

    action: Action | None
    reason: str
    at_s: float
    numbers: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def verb(self) -> Verb:
        return Verb.KEEP if self.action is None else self.action.verb


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """An action that would be right, or None, with the reason; and how long it must look right before it is begun."""

    action: Action | None
    reason: str
    confirm_s: float = 0.0
    numbers: Mapping[str, float | str] = field(default_factory=dict)


class Ending(Enum):
    """How an action ended."""

    DONE = "done"
    FAILED = "failed"  # refused, or rolled back
    BUSY = "busy"  # somebody else's change is under way: it was not begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """A change whose result is still to be judged.

    Attributes:
        bias: Measured over predicted latency before the change, where that is more than 1: how far off predictions are
            here anyway. None: it could not be told, so the prediction counts as it is.
        failures: How often an undo of it has failed.
    """

    action: Action
    due_s: float
    bias: float | None
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Barred:
    """What did not do, until when it is not tried again, and how often that has happened.

    ``verb``: to change to the granularity (that failed, or was undone), or to add a replica of it (which failed).
    """

    verb: Verb
    num_stages: int
    until_s: float
    times: int

    def is_of(self, verb: Verb, num_stages: int) -> bool:
        return (self.verb, self.num_stages) == (verb, num_stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """An action that has looked right since ``since_s``."""

    action: Action
    since_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyState:
    """What the policy remembers.

    Attributes:
        fleet: Replicas that serve now.
        since_s: Since when the granularity is as it is.
        under_way: The action that is being carried out.
        changes_s: When the last actions began, newest last.
        bias: See ``Watch``; of the action under way.
        busy_s: When a request was last here, or among the arrivals of the shortest window; before there was one, when
            the state began.
    """

    fleet: Fleet
    since_s: float
    busy_s: float
    under_way: Action | None = None
    began_s: float = 0.0
    ended_s: float | None = None
    changes_s: tuple[float, ...] = ()
    dwell_s: float | None = None  # mean of the dwells seen
    bias: float | None = None
    watch: Watch | None = None
    barred: tuple[Barred, ...] = ()
    wish: Wish | None = None

    @property
    def main(self) -> int | None:
        """The granularity that most replicas have, of equals the finest; None where nothing serves."""
        return max(self.fleet, key=lambda each: (self.fleet.count(each), each), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConstants:
    """Everything that is chosen and not measured, with the reason of each default.

    Attributes:
        cv_window_s: FlexPipe's; its trace changes between windows of 180 s, 3 h and 12 h.
        load_limit: From this share of its capacity on, a layout counts as overloaded: queues grow as 1 / (1 - load).
        target_load: What another layout must stay below to be changed to. The distance to ``load_limit`` is the
            hysteresis of load.
        min_gain: By how much better another granularity must score: DynoPipe's hysteresis is 15 to 20 %.
        confirm_s: How long a change must look right before it is made: two intervals of 5 s see it twice.
        dwell_s: How long a granularity stays at least, but under overload: with the guard's undo this is what makes
            more than two changes a minute impossible.
        cool_down_s: Between any two actions, failed ones included.
        changes_per_min: The limit in any 60 s, whatever the others say; DynoPipe stays below 2. A wake may exceed it.
        expected_dwell_s: Taken for how long a change will pay, before dwells have been seen: the CV window, since it
            takes one to see that the traffic has changed back.
        guard_s: After a change, so long until its result is judged: handover effects are over and requests have ended.
        guard_tolerance: How much worse than predicted it may be: profiles are within 5 to 15 % here.
        bar_s: So long a granularity that failed or was undone is not changed to again; twice as long each time after.
        add_again_s: So long no replica is added of a granularity of which one did not start; twice as long each time
            after, until one starts. Shorter than ``bar_s``, since who is overloaded waits for it, and others may have
            had the memory for a moment only.
        late_share: From this share of late requests on, one more replica is asked for; none is removed above half of
            it. 5 %, as goodput is mostly asked for at 95 % and more. Only where there are targets.
        reclaim_s: A surplus of replicas must last so long before one is removed: FlexPipe's reclamation window.
        idle_s: Without a request for so long, all replicas go, where ``min_replicas`` is 0.
        deadline_s: T of Eq 12: within it a request that waits should be served. Replicas that come count from when
            each of them serves, one start after the other.
    """

    score: ScoreConstants = field(default_factory=ScoreConstants)
    scale: ScaleConstants = field(default_factory=ScaleConstants)
    cv_window_s: float = 180.0
    load_limit: float = 0.9
    target_load: float = 0.75
    min_gain: float = 0.15
    confirm_s: float = 10.0
    dwell_s: float = 60.0
    cool_down_s: float = 15.0
    changes_per_min: int = 2
    expected_dwell_s: float = 180.0
    guard_s: float = 30.0
    guard_tolerance: float = 0.25
    bar_s: float = 600.0
    add_again_s: float = 60.0
    late_share: float = 0.05
    reclaim_s: float = 300.0
    idle_s: float = 300.0
    deadline_s: float = 30.0
    min_replicas: int = 1
    max_replicas: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.target_load <= self.load_limit:
            raise ValueError("target_load must be above 0 and at most load_limit")
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1 or self.changes_per_min < 1:
            raise ValueError("an impossible number of replicas or changes")


def known(reading: Reading, otherwise: float) -> float:
    """Return the value of a reading, or ``otherwise`` where it is absent."""
    return reading if isinstance(reading, float | int) else otherwise
