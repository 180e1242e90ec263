"""What a calm look at load and candidates asks for: more replicas, another granularity, fewer replicas, or nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isinf

from planner.granularity import Candidate, expected_latency_s, instances, scores
from planner.policy_state import Action, Verb, known
from planner.policy_view import View
from planner.policy_words import replicas, stages
from planner.scaling import serves_in_time, wanted_instances

_HARDLY_LOADED = 0.25  # of capacity: who is late here would be late with more replicas, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed:
    """An action that would be right, or None, with the reason; and how long it must look right before it is begun."""

    action: Action | None
    reason: str
    confirm_s: float = 0.0
    numbers: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ranked:
    """A candidate with its score, the replicas that it would have, and whether they serve the demand."""

    candidate: Candidate
    score: float
    replicas: int
    able: bool

    @property
    def rate_per_s(self) -> float:
        return self.candidate.throughput_per_s * self.replicas


def propose(view: View) -> Proposed:
    """Return what should change, if anything.

    1. overload, a queue that asks for more (Eq 11), or late requests: add replicas where there may be more
    2. overload that no replica can take: the granularity that serves most, at once
    3. the best granularity is another one: change, if it gains enough, for long enough, to pay for the change
    4. more replicas than needed: remove one, once that has lasted
    """
    main = view.state.main
    assert main is not None, "an empty fleet is asleep"
    ranked = rank(view)
    current = next(each for each in ranked if each.candidate.num_stages == main)
    best = _best(view, ranked)
    overloaded = view.load > view.constants.load_limit
    more = _more_replicas(view, ranked, current, overloaded=overloaded)
    if more is not None:
        return more
    if overloaded:
        return _out_of_overload(view, current, best)
    if best.candidate.num_stages != main:
        return _other_granularity(view, current, best)
    return _fewer_replicas(view, current)


def rank(view: View) -> list[_Ranked]:
    """Return every candidate with its score, and whether the replicas that it may have serve the demand.

    What serves now is able up to ``load_limit``, what would be changed to only up to ``target_load``.
    """
    constants, demand = view.constants, view.demand_per_s or 0.0
    ranked = []
    for candidate, score in zip(
        view.candidates, scores(view.candidates, cv=view.cv, constants=constants.score), strict=True
    ):
        is_main = candidate.num_stages == view.state.main
        limit = constants.load_limit if is_main else constants.target_load
        most = max(1, min(constants.max_replicas, candidate.most_replicas))
        asked = instances(candidate, rate_per_s=demand, load_limit=limit, constants=constants.score)
        replicas = min(most, max(asked, constants.min_replicas))
        able = demand <= limit * view.rate_of(candidate.num_stages) * replicas
        ranked.append(_Ranked(candidate=candidate, score=score, replicas=replicas, able=able))
    return ranked


def quickest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate that serves soonest after a start; of equals the one of least latency."""
    return min(candidates, key=lambda each: (each.start_s, each.latency_s))


def _best(view: View, ranked: Sequence[_Ranked]) -> _Ranked:
    """Return the highest score of those that serve the demand, and no slower; where none does, what serves most."""
    barred = {each.num_stages for each in view.state.barred if each.until_s > view.now_s}
    open_to = [each for each in ranked if each.candidate.num_stages not in barred or _is_main(view, each)]
    main = view.state.main
    now_s = None if main is None else view.expected_of(main)
    able = [each for each in open_to if each.able and (_is_main(view, each) or not _is_slower(view, each, now_s))]
    if able:
        return max(able, key=lambda each: (each.score, _is_main(view, each)))
    return max(open_to, key=lambda each: (each.rate_per_s, _is_main(view, each)))


def _is_slower(view: View, ranked: _Ranked, now_s: float | None) -> bool:
    """Say whether requests are predicted to take longer with it than the ``now_s`` that they take now."""
    then_s = view.expected_of(ranked.candidate.num_stages)
    return now_s is not None and then_s is not None and then_s > now_s


def _is_main(view: View, ranked: _Ranked) -> bool:
    return ranked.candidate.num_stages == view.state.main


# --- replicas ---


def _more_replicas(view: View, ranked: Sequence[_Ranked], current: _Ranked, *, overloaded: bool) -> Proposed | None:
    """Propose replicas that Eq 5 asks for under overload, Eq 11 for the queue, or one for requests that are late.

    They may be of any granularity for which there is room: what is left of a cluster is often too small for more of
    what serves, and still takes finer stages.
    """
    constants, have = view.constants, len(view.state.fleet)
    room = max(view.room_for(each.candidate.num_stages) for each in ranked)
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
    which, in_time = _in_time(view, ranked, count=wanted - have, queue=queue)
    count = min(wanted - have, view.room_for(which.num_stages))
    action = Action(verb=Verb.ADD, num_stages=which.num_stages, count=count)
    asked_by = f"load {view.load:.0%}" if overloaded else f"{queue:.0f} requests wait"
    if late and not overloaded:
        asked_by = f"{known(view.observation.late_share, 0.0):.0%} of the requests are late"
    timely = "" if in_time else f"; none serves what waits within {constants.deadline_s:g} s, so the quickest"
    ready = f"; {which.start_in_words}" if which.start_in_words else ""
    reason = f"{replicas(have + count)} instead of {have}: {asked_by}, {view.cv_in_words}{timely}{ready}"
    # Whoever waits has waited already; a load over the limit may be one burst, so it has to be seen twice.
    confirm_s, numbers = 0.0 if queue else constants.confirm_s, {"start_s": which.start_s}
    return Proposed(action=action, reason=reason, confirm_s=confirm_s, numbers=numbers)


def _in_time(view: View, ranked: Sequence[_Ranked], *, count: int, queue: float) -> tuple[Candidate, bool]:
    """Return the best granularity of which new replicas serve the queue in time (Eq 12), else the quickest.

    The best of those with room for all ``count``, where there are such.
    """
    serving = [view.rate_of(num_stages) for num_stages in view.state.fleet]
    rooms = {each.candidate.num_stages: view.room_for(each.candidate.num_stages) for each in ranked}
    enough = min(count, max(rooms.values()))
    fitting = [each for each in ranked if rooms[each.candidate.num_stages] >= enough]
    timely = [
        each
        for each in fitting
        if serves_in_time(
            rates_per_s=[*serving, *([view.rate_of(each.candidate.num_stages)] * enough)],
            start_s=each.candidate.start_s,
            queue_length=queue,
            deadline_s=view.constants.deadline_s,
            constants=view.constants.scale,
        )
    ]
    if timely:
        return max(timely, key=lambda each: each.score).candidate, True
    return quickest([each.candidate for each in fitting]), False


def _fewer_replicas(view: View, current: _Ranked) -> Proposed:
    """Propose to remove one replica that is not needed; those of another granularity go first."""
    constants, fleet, main = view.constants, view.state.fleet, current.candidate.num_stages
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


# --- granularity ---


def _out_of_overload(view: View, current: _Ranked, best: _Ranked) -> Proposed:
    main, load = current.candidate.num_stages, f"load {view.load:.0%}"
    if best.candidate.num_stages == main:
        return Proposed(action=None, reason=f"{load}, and nothing serves more than {stages(main)}")
    gain = best.rate_per_s / current.rate_per_s - 1
    if gain < view.constants.min_gain:
        return Proposed(
            action=None,
            reason=f"{load}, but {stages(best.candidate.num_stages)} serve only {gain:.0%} more, "
            f"below the {view.constants.min_gain:.0%} that a change must bring",
        )
    reason = f"{load} of what {stages(main)} serve; {stages(best.candidate.num_stages)} serve {gain:.0%} more"
    return Proposed(action=_change(view, best), reason=reason, confirm_s=0.0, numbers={"capacity_gain": gain})


def _other_granularity(view: View, current: _Ranked, best: _Ranked) -> Proposed:
    """Propose a change of granularity outside of overload; every threshold that keeps it gives its number."""
    constants, target = view.constants, stages(best.candidate.num_stages)
    gain = best.score / current.score - 1 if current.score > 0 else inf
    numbers: dict[str, float | str] = {"score": best.score, "score_now": current.score}
    if gain < constants.min_gain:
        limit = f"below the {constants.min_gain:.0%} that a change must bring"
        told = f"{view.cv_in_words}; {target} would gain {gain:.0%}, {limit}"
        return Proposed(action=None, reason=told, numbers=numbers)
    if view.state.watch is not None:
        return Proposed(action=None, reason=f"{target} would be better; the last change is still to be judged")
    dwelt_s = view.now_s - view.state.since_s
    if dwelt_s < constants.dwell_s:
        told = f"{target} would be better; this layout stays for {constants.dwell_s - dwelt_s:.0f} s more at least"
        return Proposed(action=None, reason=told, numbers=numbers)
    worth = _worth(view, current, best)
    if worth is not None and worth.gain_s <= worth.cost_s:
        told = f"{view.cv_in_words}; {worth.told(target)}"
        return Proposed(action=None, reason=told, numbers={**numbers, **worth.numbers})
    gains = f"{target} score {gain:.0%} higher" if current.score > 0 else f"{target} do and this does not"
    paid = "" if worth is None else f", {worth.told(target)}"
    more = {} if worth is None else worth.numbers
    reason = f"{view.cv_in_words}, {view.demand_per_s or 0:.3g} requests/s: {gains}{paid}"
    return Proposed(
        action=_change(view, best), reason=reason, confirm_s=constants.confirm_s, numbers={**numbers, **more}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worth:
    """What a change gains over the expected dwell and what it costs, in seconds that all requests wait together."""

    gain_s: float
    cost_s: float
    dwell_s: float

    @property
    def numbers(self) -> Mapping[str, float | str]:
        return {"gain_request_s": self.gain_s, "cost_request_s": self.cost_s, "expected_dwell_s": self.dwell_s}

    def told(self, target: str) -> str:
        if self.gain_s <= 0:
            return f"{target} would make requests slower"
        gains = "without bound" if isinf(self.gain_s) else f"{self.gain_s:.3g} s of waiting"
        return f"in {self.dwell_s:.0f} s {target} would save {gains}, and the change costs {self.cost_s:.3g} s"


def _worth(view: View, current: _Ranked, best: _Ranked) -> _Worth | None:
    """Return gain and cost of a change; None where nothing predicts a latency."""
    before, after = (
        expected_latency_s(
            each.candidate,
            rate_per_s=view.demand_per_s or 0.0,
            cv=view.cv,
            replicas=len(view.state.fleet),
            output_tokens=view.output_tokens,
        )
        for each in (current, best)
    )
    if before is None or after is None:
        return None
    seen_s = view.state.dwell_s
    dwell_s = view.constants.expected_dwell_s if seen_s is None else seen_s
    rate, held_s = view.demand_per_s or 0.0, best.candidate.change_s
    saved_s = 0.0 if isinf(after) else inf if isinf(before) else before - after
    held_up = known(view.observation.running, 0.0) + known(view.observation.queue_length, 0.0) + rate * held_s
    return _Worth(gain_s=saved_s * rate * dwell_s if rate else 0.0, cost_s=held_up * held_s, dwell_s=dwell_s)


def _change(view: View, best: _Ranked) -> Action:
    main = view.state.main
    assert main is not None
    return Action(
        verb=Verb.CHANGE,
        num_stages=best.candidate.num_stages,
        from_stages=main,
        count=min(view.state.fleet.count(main), max(1, best.candidate.most_replicas)),
    )
