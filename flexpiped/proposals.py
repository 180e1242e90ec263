"""What a refactoring would do: resolves what is asked for, and holds it against the engine and the planner's rules.

It moves nothing. Carrying a proposal out is ``refactoring``'s.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from engines.errors import RefactoringRefused, UnsupportedByEngine
from engines.protocol import Engine, RefactorCheck, RefactorProgress
from flexpiped.handover_records import Proposal, ScalePlan, TargetResolver, Wanted, Way
from flexpiped.replica_check import OF_ANOTHER_ENGINE, check_replica, why_replica
from planner.layout import Pipeline

ONLY_ONE: Final = "there is only one replica here, and never more"
UNCHANGED: Final = RefactorCheck(feasible=True, sentences=("this layout is in force already",))


class ReplicaHandover(Protocol):
    """A replica handover that has not begun; it reports and fails as ``Engine.refactor`` does."""

    def run(self) -> AsyncIterator[RefactorProgress]: ...

    async def cancel(self) -> bool: ...


class OtherEngine(Protocol):
    """An engine of another kind that could take the place of the one in force."""

    @property
    def resolver(self) -> TargetResolver:
        """Plans for it."""

    def replica(self, target: Pipeline) -> ReplicaHandover:
        """Return a handover to an instance of it."""


class ReplicaFleet(Protocol):
    """The replicas that there are, and how they become more or fewer."""

    def engine_of(self, number: int) -> Engine:
        """Return the engine of a replica. Raises ``RefactoringRefused``."""

    def devices_beside(self, number: int | None) -> frozenset[str]:
        """Return the devices of all other replicas than this one; None: than the main one."""

    async def plan(self, wanted: Wanted, *, resolver: TargetResolver) -> ScalePlan:
        """Return which come or leave, of those that serve now. Raises ``RefactoringRefused``, ``PlannerError``."""

    def plan_restart(self, pipelines: Sequence[Pipeline]) -> ScalePlan:
        """Return how replicas come back that were there before."""

    def carry_out(self, plan: ScalePlan) -> ReplicaHandover:
        """Return what does that."""


class Proposals:
    """Says what a refactoring of the engine in force would do.

    Args:
        engine, resolver: Those of now; they raise ``EngineError`` while there is none.
        has_replica: Whether a second instance can be had.
        fleet: The replicas; None where there is only one, and never more.
        other_engine: Finds an engine by its name, or raises ``UnsupportedByEngine``; it may block.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine],
        resolver: Callable[[], TargetResolver],
        has_replica: bool,
        fleet: ReplicaFleet | None,
        other_engine: Callable[[str], OtherEngine] | None,
    ) -> None:
        self._engine = engine
        self._resolver = resolver
        self._has_replica = has_replica
        self._fleet = fleet
        self._other_engine = other_engine

    async def propose(self, wanted: Wanted) -> Proposal:
        """Say what ``Refactorings.start`` would do. Moves nothing, and is answered at any time.

        Raises:
            PlannerError, EngineError
        """
        if wanted.replicas is not None:
            return await self._propose_scale(wanted)
        engine, taken = self.engine_on(wanted.on), self._devices_beside(wanted.on)
        current = engine.pipeline
        if wanted.engine not in (None, engine.capabilities.name):
            return await self._propose_other(engine, wanted)
        if not wanted.names_a_layout:
            return Proposal(current=current, target=current, check=UNCHANGED)
        resolver = self._resolver()
        resident = engine.capabilities.resident
        target = await asyncio.to_thread(resolver.resolve, wanted, current=current, resident=resident, taken=taken)
        if target == current:
            return Proposal(current=current, target=target, check=UNCHANGED, on=wanted.on)
        if held := sorted(taken & set(target.device_ids)):
            return Proposal(current=current, target=target, check=_held_by_others(held), on=wanted.on)
        check = await engine.check_refactor(target)
        why = why_replica(wanted, capabilities=engine.capabilities, check=check)
        if why is None or not self._has_replica:
            proposal = Proposal(current=current, target=target, check=check, on=wanted.on)
            return await _by_the_rules(proposal, resolver)
        check = await check_replica(engine, target, resolver=resolver, check=check, why=why)
        proposal = Proposal(current=current, target=target, check=check, way=Way.REPLICA, on=wanted.on)
        return await _by_the_rules(proposal, resolver)

    def engine_on(self, number: int | None) -> Engine:
        """Return the engine of a replica; None: the main one. Raises ``RefactoringRefused``, ``EngineError``."""
        if number is None:
            return self._engine()
        if self._fleet is None:
            raise RefactoringRefused(f"there is no replica {number}; there is only one, which needs no number")
        return self._fleet.engine_of(number)

    def _devices_beside(self, number: int | None) -> frozenset[str]:
        return frozenset() if self._fleet is None else self._fleet.devices_beside(number)

    async def _propose_scale(self, wanted: Wanted) -> Proposal:
        """Say which replicas would come or leave."""
        current = self._engine().pipeline
        if self._fleet is None:
            raise RefactoringRefused(ONLY_ONE)
        plan = await self._fleet.plan(wanted, resolver=self._resolver())
        if plan.before == plan.after:
            check = RefactorCheck(feasible=True, sentences=(f"{plan.after} replicas serve already",))
            return Proposal(current=current, target=current, check=check)
        return scaled(current, plan)

    async def _propose_other(self, engine: Engine, wanted: Wanted) -> Proposal:
        """Say what it would mean to put another engine in the place of this one."""
        if self._devices_beside(None):
            raise RefactoringRefused("the engine is changed with one replica: flexctl scale --replicas 1 comes first")
        current, before, after = engine.pipeline, engine.capabilities.name, wanted.engine or ""
        if not wanted.names_a_layout:
            wanted = replace(wanted, stages=current.granularity)

        def find() -> tuple[TargetResolver, Pipeline]:
            resolver = self.find_other(after).resolver
            return resolver, resolver.resolve(wanted, current=current)

        resolver, target = await asyncio.to_thread(find)
        check = await check_replica(
            engine,
            target,
            resolver=resolver,
            check=OF_ANOTHER_ENGINE,
            why=f"{after} takes the place of {before}",
            is_another_engine=True,
        )
        proposal = Proposal(
            current=current, target=target, check=check, way=Way.REPLICA, engine_before=before, engine_after=after
        )
        return await _by_the_rules(proposal, resolver)

    def find_other(self, name: str) -> OtherEngine:
        """Return an engine of another kind. Raises ``UnsupportedByEngine``."""
        if self._other_engine is None:
            raise UnsupportedByEngine(f"no engine {name!r} can take the place of the one in force")
        return self._other_engine(name)


def scaled(current: Pipeline, plan: ScalePlan) -> Proposal:
    """Return the proposal that replicas come or leave."""
    check = RefactorCheck(feasible=True, sentences=(), moves=plan.sentences)
    return Proposal(current=current, target=current, check=check, way=Way.SCALE, scale=plan)


def _held_by_others(device_ids: Sequence[str]) -> RefactorCheck:
    verb = "has a stage" if len(device_ids) == 1 else "have stages"
    return RefactorCheck(feasible=False, sentences=(f"{', '.join(device_ids)} {verb} of another replica",))


async def _by_the_rules(proposal: Proposal, resolver: TargetResolver) -> Proposal:
    """Hold what is feasible to the engine against the planner's rules too, whoever made the layout."""
    if not proposal.check.feasible:
        return proposal
    second = proposal.way is Way.REPLICA
    broken = await asyncio.to_thread(
        resolver.broken_rules, proposal.target, current=proposal.current, second_instance=second
    )
    return replace(proposal, check=RefactorCheck(feasible=False, sentences=broken)) if broken else proposal
