"""flexpiped itself in a simulation: the daemon's policy, told and obeyed as the daemon does it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import assert_never

from planner.granularity import Candidate
from planner.load import Observation
from planner.policy import changed_by_others, decide, initial_state, settle
from planner.policy_rest import rests_until_s
from planner.policy_state import Action, Decision, Ending, PolicyConstants, PolicyState, Verb, known
from planner.prediction import Prediction
from planner.simulation.fleet import Fleet
from planner.simulation.members import MemberState
from planner.simulation.outlooks import Outlooks, fewest_devices
from planner.simulation.shape import Shape, Shapes
from planner.workload import Slo, Workload


@dataclass(kw_only=True)
class Flexpiped:
    """The daemon's policy (``planner.policy``), told and obeyed as the daemon does it.

    Attributes:
        expected: Traffic as it was before: what serves from the start is chosen for it.
    """

    constants: PolicyConstants
    outlooks: Outlooks
    expected: Workload
    decisions: list[Decision] = field(default_factory=list)
    _asleep_with: int = 0  # stages of the replicas that went last, when none was left

    def begin(self, fleet: Fleet) -> None:
        self._fleet = fleet
        best, count = fewest_devices(
            fleet,
            self.outlooks,
            self.expected,
            load=self.constants.target_load,
            late_share=self.constants.late_share,
        )
        for _ in range(max(self.constants.min_replicas, min(count, self.constants.max_replicas))):
            fleet.add(best, start_s=0.0)
        fleet.clock.run(until_s=fleet.clock.now_s)
        self._state: PolicyState = initial_state(fleet.stages, now_s=0.0)

    def tick(self, observation: Observation, now_s: float) -> str:
        fleet = tuple(sorted(self._fleet.stages))
        if self._state.under_way is None and fleet != self._state.fleet:
            self._state = changed_by_others(self._state, now_s=now_s, fleet=fleet)
        candidates = self._candidates(observation)
        self._state, decision = decide(self._state, observation, candidates, now_s, self.constants)
        self.decisions.append(decision)
        if decision.action is not None:
            self._carry_out(decision.action)
        return decision.reason

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return rests_until_s(self._state, now_s=now_s, next_s=next_s, constants=self.constants)

    def _carry_out(self, action: Action) -> None:
        """Act on one replica after the other, as the daemon does: the first that does not ends it."""
        if action.verb is Verb.ADD and not self._is_room(action):
            self._settle(action, Ending.FAILED)
            return
        left = self._count(action)

        def done(well: bool) -> None:
            nonlocal left
            left -= 1
            if well and left > 0:
                self._begin(action, done)
            else:
                self._settle(action, Ending.DONE if well else Ending.FAILED)

        self._begin(action, done)

    def _is_room(self, action: Action) -> bool:
        """Say whether there is room for all that are to come: the daemon looks before the first one starts."""
        shape = self._fleet.shapes[action.num_stages]
        return self._fleet.pool.room_for(shape, placing=self._fleet.placing) >= action.count

    def _count(self, action: Action) -> int:
        """Return how many replicas it concerns: where all are to go, the last one stays at first, and goes by itself
        when nobody has come since."""
        serving = len(self._fleet.stages)
        goes_on = action.verb is Verb.REMOVE and 1 < serving <= action.count
        return serving - 1 if goes_on else action.count

    def _begin(self, action: Action, done: Callable[[bool], None]) -> None:
        match action.verb:
            case Verb.ADD:
                self._fleet.add(action.num_stages, done=done)
            case Verb.REMOVE:
                self._fleet.remove(action.num_stages, done=done)
            case Verb.CHANGE | Verb.UNDO:
                self._fleet.change(action.from_stages, action.num_stages, done=done)
            case Verb.KEEP:
                raise AssertionError("to keep is no action")
            case _:
                assert_never(action.verb)

    def _settle(self, action: Action, ending: Ending) -> None:
        after = self._fleet.stages
        if ending is Ending.DONE or after != self._state.fleet:
            self._fleet.layout_changed()
        if after or action.verb is Verb.REMOVE:
            self._asleep_with = 0 if after else action.num_stages
        now_s = self._fleet.clock.now_s
        self._state = settle(self._state, now_s=now_s, fleet=after, ending=ending, constants=self.constants)

    def _candidates(self, observation: Observation) -> list[Candidate]:
        workload = Workload(
            rate_per_s=max(1e-3, known(observation.window(self.constants.cv_window_s).rate_per_s, 1e-3)),
            prompt_tokens_mean=max(1.0, known(observation.prompt_tokens_mean, self.expected.prompt_tokens_mean)),
            output_tokens_mean=max(1.0, known(observation.output_tokens_mean, self.expected.output_tokens_mean)),
            prompt_tokens_cv=self.expected.prompt_tokens_cv,
            output_tokens_cv=self.expected.output_tokens_cv,
        )
        cvs = self.outlooks.best_cvs(workload)
        found = (self._candidate(shape, workload, cvs[stages]) for stages, shape in self._open.items())
        return [each for each in found if each is not None]

    @property
    def _open(self) -> Shapes:
        """What may be decided for: what sleeps wakes up as it was."""
        shapes = self._fleet.shapes
        return shapes if self._state.fleet or not self._asleep_with else {self._asleep_with: shapes[self._asleep_with]}

    def _candidate(self, shape: Shape, workload: Workload, best_cv: float | None) -> Candidate | None:
        fleet, pool = self._fleet, self._fleet.pool
        members = [each for each in fleet.members if each.shape is shape and each.state is not MemberState.DRAINING]
        placed = pool.find(shape, now_s=fleet.clock.now_s, placing=fleet.placing)
        if placed is None and not members:
            placed = fleet.place_instead(shape)
        kv_tokens = [each.placed.kv_tokens for each in members] or [placed.kv_tokens if placed else 0]
        if not min(kv_tokens):
            return None
        pipeline = self.outlooks.pipeline(shape, workload, kv_tokens=sum(kv_tokens) // len(kv_tokens))
        calm = pipeline.predict(Workload(rate_per_s=1e-3), Slo(), replicas=1)
        if calm.capacity_per_s <= 0:
            return None

        def outlook(rate_per_s: float, cv: float) -> Prediction:
            return pipeline.predict(Workload(rate_per_s=max(rate_per_s, 1e-6), cv=cv), Slo(), replicas=1)

        room = pool.room_for(shape, placing=fleet.placing)
        shown = members[0].placed if members else placed
        return Candidate(
            num_stages=shape.num_stages,
            throughput_per_s=calm.capacity_per_s,
            latency_s=calm.ttft_s + (workload.output_tokens_mean - 1) * calm.tpot_s,
            best_cv=best_cv,
            change_s=shape.pause_s,
            start_s=shape.warm_s if placed is not None and placed.is_warm else shape.cold_s,
            devices=shape.num_stages,
            shared_devices=0 if shown is None else pool.shared(shown),
            most_replicas=max(1, len(members)) + room,  # at least the one that takes another's place
            room=room,
            outlook=outlook,
        )
