"""The candidates in order: which of them serve the demand, with how many replicas, and which is the best."""

from collections.abc import Sequence
from dataclasses import dataclass

from planner.granularity import Candidate, instances, scores
from planner.policy_state import Verb
from planner.policy_view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A candidate with its score, the replicas that it would have, and whether they serve the demand."""

    candidate: Candidate
    score: float
    replicas: int
    able: bool

    @property
    def num_stages(self) -> int:
        return self.candidate.num_stages

    @property
    def rate_per_s(self) -> float:
        return self.candidate.throughput_per_s * self.replicas


def rank(view: View) -> list[Ranked]:
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
        ranked.append(Ranked(candidate=candidate, score=score, replicas=replicas, able=able))
    return ranked


def quickest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate that serves soonest after a start; of equals the one of least latency."""
    return min(candidates, key=lambda each: (each.start_s, each.latency_s))


def best_of(view: View, ranked: Sequence[Ranked]) -> Ranked:
    """Return the highest score of those that serve the demand, and no slower; where none does, what serves most."""
    open_to = [each for each in ranked if _is_main(view, each) or not view.barred_for_s(Verb.CHANGE, each.num_stages)]
    main = view.state.main
    now_s = None if main is None else view.expected_of(main)
    able = [each for each in open_to if each.able and (_is_main(view, each) or not _is_slower(view, each, now_s))]
    if able:
        return max(able, key=lambda each: (each.score, _is_main(view, each)))
    return max(open_to, key=lambda each: (each.rate_per_s, _is_main(view, each)))


def _is_slower(view: View, ranked: Ranked, now_s: float | None) -> bool:
    """Say whether requests are predicted to take longer with it than the ``now_s`` that they take now."""
    then_s = view.expected_of(ranked.num_stages)
    return now_s is not None and then_s is not None and then_s > now_s


def _is_main(view: View, ranked: Ranked) -> bool:
    return ranked.num_stages == view.state.main
