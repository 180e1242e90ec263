"""What should change now, if anything: ``decide`` is asked once an interval, and ``settle`` told how an action ended.

    decide --action--> carried out by the caller --settle--> guard --> judged: stays, or undone and barred for a while

The first of these that applies decides, and gives the reason:

1. an action is under way: one at a time
2. the last change is due to be judged: worse than predicted, and than the old layout would be, is undone;
   both for the requests that were there and have come (``planner.guard``). An undo that was not done is judged again
3. something that has to be known is not
4. nothing serves: a request wakes a replica, however many changes there were, as it has nothing else to wait for;
   the wake counts as one of them for all that follows
5. nobody came for long: all replicas go, where that is allowed
6. too many changes in the last minute, or one too short ago
7. ``planner.proposal``: more replicas, another granularity, or fewer replicas, once that has looked right for a while

Pure: no clock, no I/O. The daemon and the simulator call the same function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import assert_never

from planner.arrivals import Absence
from planner.granularity import Candidate
from planner.load import Observation
from planner.policy_state import (
    Action,
    Barred,
    Decision,
    Ending,
    Fleet,
    PolicyConstants,
    PolicyState,
    Proposed,
    Verb,
    Watch,
    Wish,
)
from planner.policy_view import View, look
from planner.policy_words import action_in_words, milliseconds, stages
from planner.proposal import propose
from planner.ranking import quickest

Outcome = tuple[PolicyState, Decision]
_MINUTE_S = 60.0
_PATIENCE = 3.0  # guards in which a change must have become possible to judge


def initial_state(fleet: Sequence[int], *, now_s: float) -> PolicyState:
    """Return the state of a policy that begins with these replicas."""
    return PolicyState(fleet=tuple(sorted(fleet)), since_s=now_s, busy_s=now_s)


def decide(
    state: PolicyState,
    observation: Observation,
    candidates: Sequence[Candidate],
    now_s: float,
    constants: PolicyConstants,
) -> Outcome:
    """Return the state to keep and the decision. Where it has an action, ``settle`` must be called when that ended."""
    view = look(state, observation, candidates, now_s, constants)
    if view.has_arrivals:
        state = replace(state, busy_s=now_s)
    recent = tuple(at_s for at_s in state.changes_s if at_s > now_s - _MINUTE_S)
    view = replace(view, state=replace(state, changes_s=recent))
    for rule in _RULES:
        outcome = rule(view)
        if outcome is not None:
            return outcome
    return _proposed(view)


def settle(
    state: PolicyState, *, now_s: float, fleet: Sequence[int], ending: Ending, constants: PolicyConstants
) -> PolicyState:
    """Return the state after the action under way has ended. ``fleet``: what serves now."""
    action, after = state.under_way, tuple(sorted(fleet))
    state = replace(state, fleet=after, under_way=None, ended_s=now_s, wish=None)
    if action is None:
        return state
    match ending:
        case Ending.BUSY:
            watch = _later(state.watch, now_s, constants) if action.verb is Verb.UNDO else state.watch
            return replace(state, changes_s=state.changes_s[:-1], bias=None, watch=watch)
        case Ending.FAILED:
            return replace(_failed(state, action, now_s, constants), bias=None)
        case Ending.DONE:
            return _done(state, action, now_s, constants)
        case _:
            assert_never(ending)


def changed_by_others(state: PolicyState, *, now_s: float, fleet: Sequence[int]) -> PolicyState:
    """Return the state after somebody else (an operator) has changed what serves: nothing of the old is judged."""
    after: Fleet = tuple(sorted(fleet))
    # Whoever woke it did so for a request, which may be out of the windows by now if the start took long.
    busy_s = state.busy_s if state.fleet else now_s
    return replace(state, fleet=after, since_s=now_s, busy_s=busy_s, ended_s=now_s, watch=None, wish=None)


# --- the rules, in order ---


def _one_at_a_time(view: View) -> Outcome | None:
    action = view.state.under_way
    if action is None:
        return None
    since_s = view.now_s - view.state.began_s
    return view.state, view.keep(f"{action_in_words(action)} is under way since {since_s:.0f} s")


def _judge(view: View) -> Outcome | None:
    watch = view.state.watch
    if watch is None or view.now_s < watch.due_s:
        return None
    undo = Action(
        verb=Verb.UNDO,
        num_stages=watch.action.from_stages,
        from_stages=watch.action.num_stages,
        count=watch.action.count,
    )
    measured, new, old = (
        view.observation.latency_s,
        view.latency_since_change_s(watch.action.num_stages),
        view.latency_since_change_s(watch.action.from_stages),
    )
    if isinstance(measured, Absence):
        if view.now_s < watch.due_s + (_PATIENCE - 1) * view.constants.guard_s:
            return None
        return replace(view.state, watch=None), view.keep(f"the last change cannot be judged: latency {measured.value}")
    if new is None or old is None or watch.action.num_stages not in view.state.fleet:
        return replace(view.state, watch=None), view.keep("the last change cannot be judged, as nothing was predicted")
    bias = 1.0 if watch.bias is None else watch.bias
    numbers = {"measured_s": measured, "predicted_s": new * bias, "old_predicted_s": old * bias}
    took, predicted = milliseconds(measured), milliseconds(new * bias)
    if measured <= new * bias * (1 + view.constants.guard_tolerance) or measured <= old * bias:
        told = f"{stages(watch.action.num_stages)} pay: {took} a request, {predicted} were predicted"
        return replace(view.state, watch=None), view.keep(told, **numbers)
    if view.is_limited:
        return None
    told = f"{took} a request with {stages(watch.action.num_stages)}, {predicted} were predicted"
    # The watch stays until it is undone: whatever keeps that from happening, it is judged again.
    return begin(replace(view, state=replace(view.state, bias=None)), undo, told, numbers)


def _something_unknown(view: View) -> Outcome | None:
    if not view.candidates:
        return view.state, view.keep("no granularity is known that would fit")
    if isinstance(view.observation.queue_length, Absence) and view.state.fleet:
        absence = view.observation.queue_length
        if absence is not Absence.UNSUPPORTED:
            return view.state, view.keep(f"the engine's queue is {absence.value}")
    if view.demand_per_s is None:
        return view.state, view.keep("arrivals are not measured yet")
    main = view.state.main
    if main is not None and view.candidate(main) is None:
        return view.state, view.keep(f"nothing is known of {stages(main)}, which serve now")
    return None


def _asleep(view: View) -> Outcome | None:
    if view.state.fleet:
        return None
    if not view.is_awaited:
        return view.state, view.keep("asleep: no request waits")
    best = quickest(view.candidates)
    action = Action(verb=Verb.ADD, num_stages=best.num_stages)
    ready, due_s = best.start_in_words or f"ready in {best.start_s:.2g} s", view.constants.deadline_s
    # What an engine takes to be tried out is in it: nobody does that at a wake, so the first request takes as long.
    late = f"; later than the {due_s:g} s within which it should be served" if best.start_s > due_s else ""
    return begin(view, action, f"a request waits; {ready}{late}", {"start_s": best.start_s})


def _idle(view: View) -> Outcome | None:
    idle_s = view.now_s - view.state.busy_s
    if view.constants.min_replicas > 0 or view.is_busy or idle_s < view.constants.idle_s or view.is_limited:
        return None
    main = view.state.main
    assert main is not None, "an empty fleet is asleep"
    action = Action(verb=Verb.REMOVE, num_stages=main, count=view.state.fleet.count(main))
    return begin(view, action, f"no request for {idle_s:.0f} s", {"idle_s": idle_s})


def _limited(view: View) -> Outcome | None:
    if view.is_limited:
        count = len(view.state.changes_s)
        return view.state, view.keep(f"{count} changes in the last minute, as many as there may be")
    ended_s = view.state.ended_s
    if ended_s is not None and view.now_s - ended_s < view.constants.cool_down_s:
        left_s = view.constants.cool_down_s - (view.now_s - ended_s)
        return view.state, view.keep(f"cooling down for {left_s:.0f} s after the last change")
    return None


def _proposed(view: View) -> Outcome:
    """Begin what is proposed, once it has looked right for as long as it must."""
    proposed = propose(view)
    if proposed.action is None:
        return replace(view.state, wish=None), view.keep(proposed.reason, **proposed.numbers)
    wish = view.state.wish
    if wish is None or not _is_alike(wish.action, proposed.action):
        wish = Wish(action=proposed.action, since_s=view.now_s)
    for_s = view.now_s - wish.since_s
    if for_s < proposed.confirm_s:
        reason = f"{proposed.reason}; looked right for {for_s:.0f} of {proposed.confirm_s:.0f} s"
        return replace(view.state, wish=wish), view.keep(reason, **proposed.numbers)
    return _begin_proposed(view, proposed, proposed.action)


def _begin_proposed(view: View, proposed: Proposed, action: Action) -> Outcome:
    bias = None
    if action.verb is Verb.CHANGE:
        measured, predicted = view.observation.latency_s, view.expected_of(action.from_stages)
        if not isinstance(measured, Absence) and predicted is not None and 0 < predicted < float("inf"):
            bias = max(1.0, measured / predicted)  # a layout that is full has a dark future, and a present less dark
    return begin(replace(view, state=replace(view.state, bias=bias)), action, proposed.reason, proposed.numbers)


_RULES: tuple[Callable[[View], Outcome | None], ...] = (
    _one_at_a_time,
    _judge,
    _something_unknown,
    _asleep,
    _idle,
    _limited,
)


# --- parts ---


def _done(state: PolicyState, action: Action, now_s: float, constants: PolicyConstants) -> PolicyState:
    match action.verb:
        case Verb.CHANGE:
            watch = Watch(action=action, due_s=now_s + constants.guard_s, bias=state.bias)
            return replace(_dwelt(state, now_s), watch=watch, bias=None)
        case Verb.UNDO:
            undone = replace(state, since_s=now_s, watch=None)
            return _bar(undone, Verb.CHANGE, action.from_stages, now_s, for_s=constants.bar_s)
        case Verb.ADD:
            return replace(state, barred=_others(state, Verb.ADD, action.num_stages))
        case _:
            return state


def _failed(state: PolicyState, action: Action, now_s: float, constants: PolicyConstants) -> PolicyState:
    match action.verb:
        case Verb.CHANGE:
            return _bar(state, Verb.CHANGE, action.num_stages, now_s, for_s=constants.bar_s)
        case Verb.UNDO:
            return replace(state, watch=_later(state.watch, now_s, constants, has_failed=True))
        case Verb.ADD:
            return _bar(state, Verb.ADD, action.num_stages, now_s, for_s=constants.add_again_s)
        case _:
            return state


def _later(watch: Watch | None, now_s: float, constants: PolicyConstants, *, has_failed: bool = False) -> Watch | None:
    """Return the watch over a change whose undo was not done: due again, twice as late each time that undo failed."""
    if watch is None:
        return None
    failures = watch.failures + has_failed
    return replace(watch, due_s=now_s + constants.guard_s * 2**failures, failures=failures)


def begin(view: View, action: Action, reason: str, numbers: Mapping[str, float | str]) -> Outcome:
    """Return the decision to act, and the state in which the action is under way."""
    state = replace(
        view.state,
        under_way=action,
        began_s=view.now_s,
        changes_s=(*view.state.changes_s, view.now_s),
        wish=None,
    )
    told = f"{action_in_words(action)}: {reason}"
    return state, Decision(action=action, reason=told, at_s=view.now_s, numbers={**view.numbers, **numbers})


def _is_alike(one: Action, other: Action) -> bool:
    """Say whether two actions are the same wish: how many replicas it concerns may change with the load."""
    return (one.verb, one.num_stages, one.from_stages) == (other.verb, other.num_stages, other.from_stages)


def _dwelt(state: PolicyState, now_s: float) -> PolicyState:
    """Return the state with a new granularity in force, and the dwell of the one before learnt."""
    seen_s = now_s - state.since_s
    mean_s = seen_s if state.dwell_s is None else (state.dwell_s + seen_s) / 2
    return replace(state, since_s=now_s, dwell_s=mean_s)


def _bar(state: PolicyState, verb: Verb, num_stages: int, now_s: float, *, for_s: float) -> PolicyState:
    """Return the state in which that is not tried for so long, twice as long each time after."""
    before = next((each.times for each in state.barred if each.is_of(verb, num_stages)), 0)
    barred = Barred(verb=verb, num_stages=num_stages, until_s=now_s + for_s * 2**before, times=before + 1)
    return replace(state, barred=(*_others(state, verb, num_stages), barred))


def _others(state: PolicyState, verb: Verb, num_stages: int) -> tuple[Barred, ...]:
    return tuple(each for each in state.barred if not each.is_of(verb, num_stages))
