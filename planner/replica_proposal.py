"""More replicas, or fewer: what load, queue and late requests ask for, of which granularity, and what is not needed."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.granularity import Candidate, instances
from planner.policy_state import Action, Proposed, Verb, known
from planner.policy_view import View
from planner.policy_words import replicas, stages
from planner.ranking import Ranked, quickest
from planner.scaling import serves_in_time, wanted_instances

_HARDLY_LOADED = 0.25  # of capacity: who is late here would be late with more replicas, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many replicas more, what asks for them, and how many requests wait for them."""

    count: int
    asked_by: str
    queue: float


def wanted_more(view: View, ranked: Sequence[Ranked], current: Ranked, *, overloaded: bool) -> Wanted | None:
    """Return the replicas that Eq 5 asks for under overload, Eq 11 for the queue, or one for requests that are late."""
    constants, have = view.constants, len(view.state.fleet)
    room = max(view.room_for(each.num_stages) for each in ranked)
    most = max(1, min(constants.max_replicas, have + room))
    queue = 0.0 if view.is_in_time else known(view.observation.queue_length, 0.0)
    for_queue = wanted_instances(most=most, cv=view.cv, queue_length=queue, constants=constants.scale) if queue else 0
    demand = view.demand_per_s or 0.0
    for_rate = instances(
        current.candidate, rate_per_s=demand, load_limit=constants.target_load, constants=constants.score
    )
    late = view.are_late and view.load > _HARDLY_LOADED
    wanted = min(
        most, max(for_rate if overloaded else have, for_queue, have + 1 if late else 0, constants.min_replicas)
    )
    if wanted <= have:
        return None
    asked_by = f"load {view.load:.0%}" if overloaded else f"{queue:.0f} requests wait"
    if late and not overloaded:
        asked_by = f"{known(view.observation.late_share, 0.0):.0%} of the requests are late"
    return Wanted(count=wanted - have, asked_by=asked_by, queue=queue)


def more_replicas(view: View, ranked: Sequence[Ranked], wanted: Wanted) -> Proposed | None:
    """Propose what is wanted, of any granularity for which there is room, and of which none has just failed.

    What is left of a cluster is often too small for more of what serves, and still takes finer stages.
    """
    open_to = [each for each in ranked if not view.barred_for_s(Verb.ADD, each.num_stages)]
    if not any(view.room_for(each.num_stages) for each in open_to):
        return None
    have = len(view.state.fleet)
    which, in_time = _in_time(view, open_to, count=wanted.count, queue=wanted.queue)
    count = min(wanted.count, view.room_for(which.num_stages))
    action = Action(verb=Verb.ADD, num_stages=which.num_stages, count=count)
    timely = "" if in_time else f"; none serves what waits within {view.constants.deadline_s:g} s, so the quickest"
    turns = ", one after the other" if count > 1 else ""
    ready = f"; {'each ' if turns else ''}{which.start_in_words}{turns}" if which.start_in_words else ""
    reason = f"{replicas(have + count)} instead of {have}: {wanted.asked_by}, {view.cv_in_words}{timely}{ready}"
    # Whoever waits has waited already; a load over the limit may be one burst, so it has to be seen twice.
    confirm_s, numbers = 0.0 if wanted.queue else view.constants.confirm_s, {"start_s": which.start_s}
    return Proposed(action=action, reason=reason, confirm_s=confirm_s, numbers=numbers)


def failed_before(view: View, ranked: Sequence[Ranked]) -> str:
    """Return in words which replicas would find room, and do not come because the last of them did not start."""
    left_s = {each.num_stages: view.barred_for_s(Verb.ADD, each.num_stages) for each in ranked}
    return "".join(
        f"; a replica of {stages(count)} failed, and is tried again in {for_s:.0f} s at the earliest"
        for count, for_s in left_s.items()
        if for_s and view.room_for(count)
    )


def _in_time(view: View, ranked: Sequence[Ranked], *, count: int, queue: float) -> tuple[Candidate, bool]:
    """Return the best granularity of which new replicas serve the queue in time (Eq 12), else the quickest.

    The best of those with room for all ``count``, where there are such.
    """
    serving = [view.rate_of(num_stages) for num_stages in view.state.fleet]
    rooms = {each.num_stages: view.room_for(each.num_stages) for each in ranked}
    enough = min(count, max(rooms.values()))
    fitting = [each for each in ranked if rooms[each.num_stages] >= enough]
    timely = [
        each
        for each in fitting
        if serves_in_time(
            serving_per_s=serving,
            coming_per_s=[view.rate_of(each.num_stages)] * enough,
            start_s=each.candidate.start_s,
            queue_length=queue,
            deadline_s=view.constants.deadline_s,
            constants=view.constants.scale,
        )
    ]
    if timely:
        return max(timely, key=lambda each: each.score).candidate, True
    return quickest([each.candidate for each in fitting]), False


def fewer_replicas(view: View, current: Ranked) -> Proposed:
    """Propose to remove one replica that is not needed; those of another granularity go first."""
    constants, fleet, main = view.constants, view.state.fleet, current.num_stages
    odd = [each for each in fleet if each != main]
    leaving = odd[0] if odd else main
    left = view.capacity_per_s - view.rate_of(leaving)
    demand = view.demand_per_s or 0.0
    nobody_waits = view.is_in_time or not (view.are_late or known(view.observation.queue_length, 0.0))
    is_calm = demand <= constants.target_load * left and nobody_waits
    if len(fleet) > max(1, constants.min_replicas) and is_calm:
        action = Action(verb=Verb.REMOVE, num_stages=leaving)
        reason = f"{demand / left:.0%} of what the others serve is asked for"
        return Proposed(action=action, reason=reason, confirm_s=constants.reclaim_s)
    return Proposed(action=None, reason=f"{view.cv_in_words}, load {view.load:.0%}; {stages(main)} score best")
