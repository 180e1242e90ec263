"""The control loop: each interval it samples the load, asks the policy, and carries out what that decided.

    sample --> candidates --> decide --+--> keep
                                       +--> refactoring, as for `flexctl rebalance` --> settle --> judged by the policy

Every cycle leaves one reason with its numbers in a log of decisions. A change by somebody else is noticed and accepted.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
from planner.layout import Pipeline
from planner.load import Observation
from planner.policy import changed_by_others, decide, initial_state, settle
from planner.policy_state import Action, Decision, Ending, Fleet, PolicyConstants, PolicyState, Verb
from planner.scaling import ScaleConstants

DECISIONS_KEPT: Final = 2000
Layouts = frozenset[tuple[str, Pipeline]]  # by the engine's name


class Candidates(Protocol):
    """What granularities there are."""

    async def of(self, engine: Engine, seen: Observation) -> tuple[Candidate, ...]:
        """Return them for ``engine`` under such a load. Raises ``PlannerError``, ``EngineError``."""

    async def starting_now(self, found: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Return candidates with what a start of each would take now."""


class Rest(Protocol):
    """What can end the engine while nobody uses it."""

    @property
    def is_asleep(self) -> bool: ...

    @property
    def pipeline(self) -> Pipeline:
        """The main pipeline; of an engine that sleeps the one that it wakes up with."""

    def sleep(self, reason: str) -> bool:
        """End the engine until the next request. False where it is in use."""

    def wake(self) -> None:
        """Start it again."""


class AutoControl:
    """Decides and acts by itself, as far as its mode allows. Used on one event loop.

    Args:
        engine: The one of now; raises ``EngineError`` while there is none.
        rest: What can end the engine while nobody uses it; None before there is one.
        fleet: Number of stages of each replica that serves, by its number, the main one first; None: there is only the
            ``engine``, and never more.
        engines: All that serve, whose load counts together; None: that one.
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
        rest: Callable[[], Rest | None] = lambda: None,
        fleet: Callable[[], Mapping[int, int]] | None = None,
        engines: Callable[[], Sequence[Engine]] | None = None,
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
        self._rest = rest
        self._replicas = fleet
        self._engines = engines
        self._found: tuple[Candidate, ...] = ()
        self._clock = clock
        self._state: PolicyState | None = None
        self._placed: Layouts = frozenset()  # when it last looked
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
            await self._look()
        except (EngineError, PlannerError) as error:
            return None if self.mode is AutoMode.OFF else self._keep(str(error))
        return None if self.mode is AutoMode.OFF else self._decide()

    async def _look(self) -> None:
        """Ask the engine, if there is one; while it sleeps, what was known still counts, but for how long it starts."""
        if self._is_asleep:
            self._found = await self._candidates.starting_now(self._found)
            return
        engine = self._engine()
        await self._load.sample(*self._all_engines())
        if self.mode is not AutoMode.OFF:
            self._found = await self._candidates.of(engine, self._load.observe())

    def _decide(self) -> Decision:
        fleet = self._fleet()
        if fleet is None:
            return self._keep("no engine serves now")
        now_s = self._clock()
        state = self._state or initial_state(fleet, now_s=now_s)
        placed = self._layouts()
        if state.under_way is None and (fleet != state.fleet or self._are_others(placed)):
            self._load.layout_changed()  # what was measured is of what served until then
            state = changed_by_others(state, now_s=now_s, fleet=fleet)
        self._placed = placed
        seen = self._load.observe()
        began_s = time.perf_counter()
        state, decision = decide(state, seen, self._open, now_s, self._constants)
        self._record(decision, took_s=time.perf_counter() - began_s)
        if decision.action is not None and self.mode is AutoMode.DRY_RUN:
            state = settle(state, now_s=now_s, fleet=fleet, ending=Ending.BUSY, constants=self._constants)
        self._state = state
        if decision.action is not None and self.mode is AutoMode.ON:
            self._acting = asyncio.create_task(self._carry_out(decision.action, decision.reason), name="auto-change")
        return decision

    @property
    def _is_asleep(self) -> bool:
        rest = self._rest()
        return rest is not None and rest.is_asleep

    @property
    def _open(self) -> tuple[Candidate, ...]:
        """What may be decided for: what sleeps wakes up as it was, since requests wake it before a decision does."""
        rest = self._rest()
        if rest is None or not rest.is_asleep:
            return self._found
        return tuple(each for each in self._found if each.num_stages == rest.pipeline.granularity)

    def _fleet(self) -> Fleet | None:
        """Return what serves now; None between two engines, when nothing should be decided."""
        if self._is_asleep:
            return ()
        with suppress(EngineError):
            if self._replicas is None:
                return (self._engine().pipeline.granularity,)
            return tuple(sorted(self._replicas().values())) or None
        return None

    def _all_engines(self) -> Sequence[Engine]:
        """Return all that serve. Raises: EngineError."""
        return (self._engine(),) if self._engines is None else self._engines()

    def _layouts(self) -> Layouts:
        """Return what each engine is and where its layers are; none while it cannot be asked."""
        if self._is_asleep:
            return frozenset()
        with suppress(EngineError):
            return frozenset((each.capabilities.name, each.pipeline) for each in self._all_engines())
        return frozenset()

    def _are_others(self, placed: Layouts) -> bool:
        """Say whether as many layouts as before serve, and not the same: cuts or devices changed, or the engine."""
        return len(placed) == len(self._placed) and placed != self._placed

    async def _carry_out(self, action: Action, reason: str) -> None:
        """Act as an operator would, and tell the policy how that ended."""
        ending, why = Ending.FAILED, "it was broken off"
        try:
            ending, why = await self.carried_out(action, reason)
        except (EngineError, PlannerError) as error:
            why = str(error)
        finally:  # whatever ended it: nothing is decided while an action counts as under way
            self._acting = None
            self._settle(ending, why)

    def _settle(self, ending: Ending, why: str) -> None:
        if self._state is None:
            return
        now_s, fleet = self._clock(), self._fleet()
        self._placed = self._layouts()
        after = self._state.fleet if fleet is None else fleet
        if ending is Ending.DONE or after != self._state.fleet:
            self._load.layout_changed()
        self._state = settle(self._state, now_s=now_s, fleet=after, ending=ending, constants=self._constants)
        if ending is not Ending.DONE:
            self._record(Decision(action=None, reason=f"not done: {why}", at_s=now_s), took_s=0.0)

    async def carried_out(self, action: Action, reason: str = "asked for") -> tuple[Ending, str]:
        """Carry an action out. The last replica is not removed but sleeps, and to add the first is to wake it up.

        Raises:
            EngineError, PlannerError
        """
        rest = self._rest()
        serving = {} if self._replicas is None or self._is_asleep else self._replicas()
        match action.verb:
            case Verb.CHANGE | Verb.UNDO:
                return await self._all_changed(action, serving)
            case Verb.ADD if serving:
                wanted = Wanted(stages=action.num_stages, replicas=len(serving) + action.count)
                return await self._changed(wanted)
            case Verb.REMOVE if (left := len(serving) - action.count) > 0:
                return await self._changed(Wanted(stages=action.num_stages, replicas=left))
            case Verb.REMOVE if len(serving) > 1:  # all of them: one stays, to sleep when nobody has come since
                return await self._changed(Wanted(stages=action.num_stages, replicas=1))
            case Verb.REMOVE if rest is not None:
                if self._refactorings.under_way is not None:
                    return Ending.BUSY, f"busy: {self._refactorings.under_way}"
                return (Ending.DONE, "") if rest.sleep(reason) else (Ending.BUSY, "requests have come meanwhile")
            case Verb.ADD if rest is not None:
                rest.wake()
                return Ending.DONE, ""
            case _:
                return Ending.FAILED, f"nothing here can {action.verb.value}"

    async def _all_changed(self, action: Action, serving: Mapping[int, int]) -> tuple[Ending, str]:
        """Change as many replicas as are meant, one after the other; the first that does not ends it."""
        if len(serving) < 2:
            return await self._changed(Wanted(stages=action.num_stages))
        having = [number for number, stages in serving.items() if stages == action.from_stages]
        ending, why = Ending.FAILED, f"no replica of {action.from_stages} stages serves any more"
        for number in having[: action.count]:
            ending, why = await self._changed(Wanted(stages=action.num_stages, on=number))
            if ending is not Ending.DONE:
                return ending, why
        return ending, why

    async def _changed(self, wanted: Wanted) -> tuple[Ending, str]:
        try:
            started = await self._refactorings.start(wanted)
        except RefactoringBusy as error:
            return Ending.BUSY, str(error)
        if isinstance(started, Proposal):
            return Ending.BUSY, "; ".join(started.check.sentences)
        record = await self._refactorings.ended(started)
        return (Ending.DONE if record.result is HandoverResult.DONE else Ending.FAILED), record.message

    def _keep(self, reason: str) -> Decision:
        decision = Decision(action=None, reason=f"keep: {reason}", at_s=self._clock())
        self._record(decision, took_s=0.0)
        return decision

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


def constants_of(settings: AutoSettings) -> PolicyConstants:
    """Return the policy's constants."""
    own = PolicyConstants.__dataclass_fields__.keys() - {"score", "scale"}
    return PolicyConstants(
        score=ScoreConstants(**{name: getattr(settings, name) for name in ScoreConstants.__dataclass_fields__}),
        scale=ScaleConstants(**{name: getattr(settings, name) for name in ScaleConstants.__dataclass_fields__}),
        **{name: getattr(settings, name) for name in own},
    )
