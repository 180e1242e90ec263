"""What a calm look at load and candidates asks for: more replicas, another granularity, fewer replicas, or nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, isinf

from planner.granularity import expected_latency_s
from planner.policy_state import Action, Proposed, Verb, known
from planner.policy_view import View
from planner.policy_words import stages
from planner.ranking import Ranked, best_of, rank
from planner.replica_proposal import failed_before, fewer_replicas, more_replicas, wanted_more


def propose(view: View) -> Proposed:
    """Return what should change, if anything.

    1. overload, a queue that asks for more (Eq 11), or late requests: add replicas where there may be more, of a
       granularity of which none has just failed to start
    2. overload that no replica can take: the granularity that serves most, at once
    3. the best granularity is another one: change, if it gains enough, for long enough, to pay for the change
    4. more replicas than needed: remove one, once that has lasted
    """
    main = view.state.main
    assert main is not None, "an empty fleet is asleep"
    ranked = rank(view)
    current = next(each for each in ranked if each.num_stages == main)
    best = best_of(view, ranked)
    overloaded = view.load > view.constants.load_limit
    wanted = wanted_more(view, ranked, current, overloaded=overloaded)
    more = None if wanted is None else more_replicas(view, ranked, wanted)
    if more is not None:
        proposed = more
    elif overloaded:
        proposed = _out_of_overload(view, current, best)
    elif best.num_stages != main:
        proposed = _other_granularity(view, current, best)
    else:
        proposed = fewer_replicas(view, current)
    return proposed if wanted is None else replace(proposed, reason=f"{proposed.reason}{failed_before(view, ranked)}")


def _out_of_overload(view: View, current: Ranked, best: Ranked) -> Proposed:
    main, load = current.num_stages, f"load {view.load:.0%}"
    if best.num_stages == main:
        return Proposed(action=None, reason=f"{load}, and nothing serves more than {stages(main)}")
    gain = best.rate_per_s / current.rate_per_s - 1
    if gain < view.constants.min_gain:
        return Proposed(
            action=None,
            reason=f"{load}, but {stages(best.num_stages)} serve only {gain:.0%} more, "
            f"below the {view.constants.min_gain:.0%} that a change must bring",
        )
    reason = f"{load} of what {stages(main)} serve; {stages(best.num_stages)} serve {gain:.0%} more"
    return Proposed(action=_change(view, best), reason=reason, confirm_s=0.0, numbers={"capacity_gain": gain})


def _other_granularity(view: View, current: Ranked, best: Ranked) -> Proposed:
    """Propose a change of granularity outside of overload; every threshold that keeps it gives its number."""
    constants, target = view.constants, stages(best.num_stages)
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


def _worth(view: View, current: Ranked, best: Ranked) -> _Worth | None:
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


def _change(view: View, best: Ranked) -> Action:
    main = view.state.main
    assert main is not None
    return Action(
        verb=Verb.CHANGE,
        num_stages=best.num_stages,
        from_stages=main,
        count=min(view.state.fleet.count(main), max(1, best.candidate.most_replicas)),
    )
