"""The control loop: each interval it samples the load, asks the policy, and carries out what that decided.

    sample --> candidates --> decide --+--> keep
                                       +--> refactoring, as for `flexctl rebalance` --> settle --> judged by the policy

Every cycle leaves one reason with its numbers in a log of decisions. A change by somebody else is noticed and accepted.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from engines.errors import EngineError, RefactoringBusy
from engines.protocol import Engine
from flexpiped import log_events
from flexpiped.events import Event, EventKind, EventLog
from flexpiped.handover_records import HandoverResult, Proposal, Wanted
from flexpiped.load_monitor import LoadSampler
from flexpiped.refactoring import Refactorings
from flexpiped.settings import AutoMode, AutoSettings
from planner.errors import PlannerError
from planner.granularity import Candidate, ScoreConstants
from planner.load import Observation
from planner.policy import changed_by_others, decide, initial_state, settle
from planner.policy_state import Action, Decision, Ending, PolicyConstants, PolicyState, Verb

DECISIONS_KEPT: Final = 2000


class Candidates(Protocol):
    """What granularities there are."""

    async def of(self, engine: Engine, seen: Observation) -> tuple[Candidate, ...]:
        """Return them for ``engine`` under such a load. Raises ``PlannerError``, ``EngineError``."""


class AutoControl:
    """Decides and acts by itself, as far as its mode allows. Used on one event loop.

    Args:
        engine: The one of now; raises ``EngineError`` while there is none.
        decided: The log of decisions.
    """

    def __init__(
        self,
        settings: AutoSettings,
        *,
        engine: Callable[[], Engine],
        load: LoadSampler,
        candidates: Candidates,
        refactorings: Refactorings,
        decided: EventLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mode = settings.mode
        self.decided = decided
        self._interval_s = settings.interval_s
        self._constants = constants_of(settings)
        self._engine = engine
        self._load = load
        self._candidates = candidates
        self._refactorings = refactorings
        self._clock = clock
        self._state: PolicyState | None = None
        self._acting: asyncio.Task[None] | None = None
        self._last: Event | None = None

    @property
    def last(self) -> Mapping[str, Any] | None:
        """The last decision as the admin API sends it, None before there is one."""
        return None if self._last is None else self._last.to_wire()

    @property
    def is_settled(self) -> bool:
        """Whether nothing that was decided is under way."""
        return self._acting is None

    def set_mode(self, mode: AutoMode) -> None:
        """Take effect with the next cycle. What is under way goes on; what was remembered begins anew after "off"."""
        if mode is AutoMode.OFF and self._acting is None:
            self._state = None
        self.mode = mode

    async def run_forever(self) -> None:
        """Run a cycle each interval."""
        while True:
            await self.cycle()
            await asyncio.sleep(self._interval_s)

    async def close(self) -> None:
        """Wait no longer for what is under way; whoever owns the refactorings ends it."""
        if self._acting is not None:
            self._acting.cancel()
            await asyncio.wait([self._acting])

    async def cycle(self) -> Decision | None:
        """Sample, and unless the mode is off, decide and begin what was decided."""
        try:
            engine = self._engine()
            await self._load.sample(engine)
            if self.mode is AutoMode.OFF:
                return None
            seen = self._load.observe()
            candidates = await self._candidates.of(engine, seen)
            return self._decide(engine, seen, candidates)
        except (EngineError, PlannerError) as error:
            if self.mode is AutoMode.OFF:
                return None
            decision = Decision(action=None, reason=f"keep: {error}", at_s=self._clock())
            self._record(decision, took_s=0.0)
            return decision

    def _decide(self, engine: Engine, seen: Observation, candidates: tuple[Candidate, ...]) -> Decision:
        now_s, fleet = self._clock(), (engine.pipeline.granularity,)
        state = self._state or initial_state(fleet, now_s=now_s)
        if state.under_way is None:
            state = changed_by_others(state, now_s=now_s, fleet=fleet)
        began_s = time.perf_counter()
        state, decision = decide(state, seen, candidates, now_s, self._constants)
        self._record(decision, took_s=time.perf_counter() - began_s)
        if decision.action is not None and self.mode is AutoMode.DRY_RUN:
            state = settle(state, now_s=now_s, fleet=fleet, ending=Ending.BUSY, constants=self._constants)
        self._state = state
        if decision.action is not None and self.mode is AutoMode.ON:
            self._acting = asyncio.create_task(self._carry_out(engine, decision.action), name="auto-change")
        return decision

    async def _carry_out(self, engine: Engine, action: Action) -> None:
        """Change the layout as an operator would, and tell the policy how that ended."""
        try:
            ending, why = await self._changed(action)
        except (EngineError, PlannerError) as error:
            ending, why = Ending.FAILED, str(error)
        self._load.layout_changed()
        self._acting = None
        if self._state is None:
            return
        now_s, serving = self._clock(), self._serving(engine)
        self._state = settle(
            self._state, now_s=now_s, fleet=(serving.pipeline.granularity,), ending=ending, constants=self._constants
        )
        if ending is not Ending.DONE:
            self._record(Decision(action=None, reason=f"not done: {why}", at_s=now_s), took_s=0.0)

    async def _changed(self, action: Action) -> tuple[Ending, str]:
        try:
            started = await self._refactorings.start(_wanted(action))
        except RefactoringBusy as error:
            return Ending.BUSY, str(error)
        if isinstance(started, Proposal):
            return Ending.BUSY, "; ".join(started.check.sentences)
        record = await self._refactorings.ended(started)
        return (Ending.DONE if record.result is HandoverResult.DONE else Ending.FAILED), record.message

    def _serving(self, before: Engine) -> Engine:
        """Return the engine in force: another one after a replica handover; while there is none, the one before."""
        try:
            return self._engine()
        except EngineError:
            return before

    def _record(self, decision: Decision, *, took_s: float) -> None:
        self._last = self.decided.publish(
            EventKind.DECISION,
            decision.reason,
            verb=decision.verb.value,
            mode=self.mode.value,
            numbers=dict(decision.numbers),
            decided_s=took_s,
        )
        if decision.action is not None:
            log_events.auto_decided(verb=decision.verb.value, reason=decision.reason, mode=self.mode.value)


def _wanted(action: Action) -> Wanted:
    """Return what an operator would ask for."""
    match action.verb:
        case Verb.CHANGE | Verb.UNDO:
            return Wanted(stages=action.num_stages)
        case _:  # there is one replica: the constants ask for no other number
            raise ValueError(f"one replica cannot {action.verb.value}")


def constants_of(settings: AutoSettings) -> PolicyConstants:
    """Return the policy's constants. There is one replica, which the engine of the daemon is."""
    names = [name for name in PolicyConstants.__dataclass_fields__ if hasattr(settings, name)]
    return PolicyConstants(
        score=ScoreConstants(**{name: getattr(settings, name) for name in ScoreConstants.__dataclass_fields__}),
        **{name: getattr(settings, name) for name in names},
    )
