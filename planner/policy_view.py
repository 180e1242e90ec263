"""One look at everything that a decision rests on, with what follows from it at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planner.arrivals import Absence, Reading, reading_to_wire
from planner.granularity import Candidate, expected_latency_s, replica_rate_per_s
from planner.guard import latency_in_queue_s
from planner.load import Observation
from planner.policy_state import Decision, PolicyConstants, PolicyState, Verb, known

_OUTPUT_TOKENS = 128.0  # of a request, before one has ended
_BY_CHANCE = 1.0  # the CV of arrivals that are too few to have one


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What ``decide`` looks at.

    Attributes:
        demand_per_s: The highest rate over the windows up to ``cv_window_s``: it rises with the short ones and falls
            with the long ones. None: not measured yet.
        cv: Of the window ``cv_window_s``; taken as 1 where requests are too few to say, and ``cv_in_words`` says so.
    """

    state: PolicyState
    observation: Observation
    candidates: tuple[Candidate, ...]
    now_s: float
    constants: PolicyConstants
    demand_per_s: float | None
    cv: float
    cv_in_words: str

    @property
    def has_arrivals(self) -> bool:
        """Whether anybody came lately, or is still here."""
        return self.is_busy or self.observation.windows[0].arrivals > 0

    @property
    def is_busy(self) -> bool:
        running, queue = self.observation.running, self.observation.queue_length
        return known(running, 0.0) + known(queue, 0.0) > 0 or self.is_awaited

    @property
    def is_awaited(self) -> bool:
        """Whether a request has no first token yet."""
        return self.observation.awaiting > 0 or known(self.observation.queue_length, 0.0) > 0

    @property
    def is_limited(self) -> bool:
        """Whether there have been as many changes in the last minute as there may be."""
        return len(self.state.changes_s) >= self.constants.changes_per_min

    @property
    def output_tokens(self) -> float:
        return known(self.observation.output_tokens_mean, _OUTPUT_TOKENS)

    @property
    def capacity_per_s(self) -> float:
        """Requests that the replicas in force serve together."""
        return sum(self.rate_of(num_stages) for num_stages in self.state.fleet)

    @property
    def load(self) -> float:
        """Demand over capacity; infinite where nothing serves."""
        capacity = self.capacity_per_s
        return (self.demand_per_s or 0.0) / capacity if capacity else float("inf")

    @property
    def are_late(self) -> bool:
        """Whether more requests miss their targets than may."""
        return known(self.observation.late_share, 0.0) > self.constants.late_share

    @property
    def is_in_time(self) -> bool:
        """Whether requests are known to meet their targets, with a distance to ``are_late``."""
        return known(self.observation.late_share, 1.0) <= self.constants.late_share / 2

    def room_for(self, num_stages: int) -> int:
        """Return how many further replicas of a granularity fit beside those that serve."""
        found = self.candidate(num_stages)
        if found is None:
            return 0
        if found.room is not None:
            return found.room
        return max(0, found.most_replicas - self.state.fleet.count(num_stages))

    def barred_for_s(self, verb: Verb, num_stages: int) -> float:
        """Return for how long something is not tried again; 0 where it may be."""
        barred = next((each for each in self.state.barred if each.is_of(verb, num_stages)), None)
        return 0.0 if barred is None else max(0.0, barred.until_s - self.now_s)

    @property
    def numbers(self) -> Mapping[str, float | str]:
        """What a decision rests on, for the record; what is absent says why."""
        seen = self.observation
        found: dict[str, float | str] = {
            "cv": self.cv,
            "load": self.load if self.state.fleet else "nothing serves",
            "demand_per_s": "not measured yet" if self.demand_per_s is None else self.demand_per_s,
            "fleet": ", ".join(map(str, self.state.fleet)),
        }
        for window in seen.windows:
            found |= {f"rate_per_s_{window.window_s:g}s": reading_to_wire(window.rate_per_s)}
            found |= {f"cv_{window.window_s:g}s": reading_to_wire(window.cv)}
            found |= {f"gradient_per_s2_{window.window_s:g}s": reading_to_wire(window.gradient_per_s2)}
        for name in ("queue_length", "queue_age_s", "running", "kv_use", "ttft_s", "tpot_s", "late_share"):
            found[name] = reading_to_wire(getattr(seen, name))
        found["busiest_stage"] = reading_to_wire(_busiest(seen.stage_busy))
        return found | _taken(seen.taken_bytes)

    def candidate(self, num_stages: int) -> Candidate | None:
        """Return what is known of a granularity."""
        return next((each for each in self.candidates if each.num_stages == num_stages), None)

    def rate_of(self, num_stages: int) -> float:
        """Return what one replica of a granularity serves; 0 where nothing is known of it."""
        found = self.candidate(num_stages)
        return 0.0 if found is None else replica_rate_per_s(found, self.constants.score)

    def expected_of(self, num_stages: int) -> float | None:
        """Return the latency that requests would have now with replicas of this granularity, as many as there are."""
        found = self.candidate(num_stages)
        if found is None or self.demand_per_s is None:
            return None
        return expected_latency_s(
            found,
            rate_per_s=self.demand_per_s,
            cv=self.cv,
            replicas=len(self.state.fleet),
            output_tokens=self.output_tokens,
        )

    def latency_since_change_s(self, num_stages: int) -> float | None:
        """Return the latency that requests since the last change would have with this granularity: as expected of the
        traffic, or, where that is more, with what was there then and has come in fact."""
        expected, found = self.expected_of(num_stages), self.candidate(num_stages)
        since = self.observation.since_change
        if expected is None or found is None or since is None:
            return expected
        served_per_s = self.rate_of(num_stages) * max(1, len(self.state.fleet))
        return max(expected, latency_in_queue_s(since, served_per_s=served_per_s, alone_s=found.latency_s))

    def keep(self, reason: str, **numbers: float | str) -> Decision:
        """Return the decision to do nothing."""
        return Decision(action=None, reason=f"keep: {reason}", at_s=self.now_s, numbers={**self.numbers, **numbers})


def look(
    state: PolicyState,
    observation: Observation,
    candidates: Sequence[Candidate],
    now_s: float,
    constants: PolicyConstants,
) -> View:
    """Return the view of a cycle."""
    near = [each for each in observation.windows if each.window_s <= constants.cv_window_s] or observation.windows[:1]
    rates = [each.rate_per_s for each in near if not isinstance(each.rate_per_s, Absence)]
    window = observation.window(constants.cv_window_s)
    if isinstance(window.cv, Absence):
        cv, words = _BY_CHANCE, f"CV taken as {_BY_CHANCE:g} ({window.cv.value})"
    else:
        cv, words = window.cv, f"CV {window.cv:.2f} ({window.window_s:g} s)"
    return View(
        state=state,
        observation=observation,
        candidates=tuple(candidates),
        now_s=now_s,
        constants=constants,
        demand_per_s=max(rates) if rates else None,
        cv=cv,
        cv_in_words=words,
    )


def _busiest(stages: Sequence[Reading]) -> Reading:
    """Return the share of the time that the busiest stage computed, of those that say it."""
    known_shares = [each for each in stages if not isinstance(each, Absence)]
    return max(known_shares, default=next(iter(stages), Absence.NOT_YET))


def _taken(taken_bytes: Mapping[str, int] | Absence) -> dict[str, float | str]:
    """Return what others hold of the devices in all, and of each where they hold any."""
    if isinstance(taken_bytes, Absence):
        return {"taken_bytes": taken_bytes.value}
    found: dict[str, float | str] = {"taken_bytes": sum(taken_bytes.values())}
    return found | {f"taken_bytes_{device_id}": held for device_id, held in taken_bytes.items() if held}
