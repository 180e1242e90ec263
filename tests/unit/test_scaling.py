"""More and fewer replicas through the one place where refactorings enter, with the fake engine."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from engines.errors import RefactoringBusy, RefactoringRefused
from flexpiped.events import EventLog
from flexpiped.handover_records import HandoverRecord, HandoverResult, Wanted, Way, proposal_to_wire
from flexpiped.intent import InForce, IntentKeeper
from flexpiped.refactoring import Refactorings, Started
from flexpiped.replica import ReplicaState
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.scaling import Fleet
from planner.errors import NoFeasiblePlan
from tests.support.layouts import EvenResolver, even_pipeline
from tests.support.until import until
from tests.unit.test_replicas import Stand, begun
from tests.unit.test_supervisor import undisturbed

TAKEN = (("cpu:0", "cpu:1"), ("cpu:0", "cpu:1", "cpu:2"))  # where two replicas of one stage come back


class ScaleStand(Stand):
    """Replicas behind ``Refactorings``; the main one has two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.events = EventLog()
        self.resolver = EvenResolver()
        self.fleet = Fleet(replicas=lambda: self.replicas, factory=lambda: self.workshop.make, drain_deadline_s=5.0)
        self.refactorings = Refactorings(
            engine=lambda: self.replicas.all[0].supervisor.engines[0],
            resolver=lambda: self.resolver,
            events=self.events,
            replica=lambda target, on: ReplicaRunner(
                (self.replicas.main if on is None else self.fleet.replica(on)).supervisor, target
            ),
            fleet=self.fleet,
        )

    async def scaled(self, wanted: Wanted) -> HandoverRecord:
        started = await self.refactorings.start(wanted)
        assert isinstance(started, Started)
        return await self.refactorings.ended(started)

    def in_force(self) -> InForce:
        return InForce(engine="fake", pipelines=self.replicas.lasting_pipelines)

    @property
    def layouts(self) -> dict[int, tuple[str, ...]]:
        return {each.number: each.supervisor.pipeline.device_ids for each in self.replicas.all}


@pytest.fixture
async def stand() -> AsyncIterator[ScaleStand]:
    stand = ScaleStand()
    await stand.add(even_pipeline(2))
    yield stand
    await stand.refactorings.close()
    await stand.replicas.close()


async def test_replicas_come_on_devices_that_nobody_has(stand: ScaleStand) -> None:
    record = await stand.scaled(Wanted(replicas=3))
    assert (record.result, record.way, record.what) == (HandoverResult.DONE, Way.SCALE, "1 -> 3 replicas")
    assert record.message == "3 replicas serve: 1 of 2 stages, 2 of 2 stages, 3 of 2 stages"
    assert stand.layouts == {1: ("cpu:0", "cpu:1"), 2: ("cpu:2", "cpu:3"), 3: ("cpu:4", "cpu:5")}
    assert stand.fleet.serving == {1: 2, 2: 2, 3: 2}


async def test_replicas_of_another_granularity_come(stand: ScaleStand) -> None:
    proposal = await stand.refactorings.propose(Wanted(replicas=2, stages=4))
    assert proposal_to_wire(proposal)["moves"] == ["a replica of 4 stages on cpu:2, cpu:3, cpu:4, cpu:5 comes"]
    assert len(stand.replicas.all) == 1
    await stand.scaled(Wanted(replicas=2, stages=4))
    assert stand.fleet.serving == {1: 2, 2: 4}
    with pytest.raises(NoFeasiblePlan, match=r"no room for replica 3: 2 devices are left \(cpu:0, .* are taken\)"):
        await stand.refactorings.start(Wanted(replicas=3, stages=4))


async def test_fewer_replicas_under_running_streams_lose_nothing(stand: ScaleStand) -> None:
    await stand.scaled(Wanted(replicas=3, stages=1))
    streams = await begun(stand, 6)
    record = await stand.scaled(Wanted(replicas=1))
    assert (record.result, record.what) == (HandoverResult.DONE, "3 -> 1 replicas")
    assert list(stand.layouts) == [1]
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_of_fewer_replicas_the_named_one_leaves_first_then_that_granularity(stand: ScaleStand) -> None:
    await stand.scaled(Wanted(replicas=2, stages=4))
    await stand.scaled(Wanted(replicas=3, stages=1))
    assert (await stand.refactorings.propose(Wanted(replicas=2, on=1))).check.moves == ("replica 1 drains and ends",)
    assert (await stand.refactorings.propose(Wanted(replicas=2, stages=4))).check.moves == (
        "replica 2 drains and ends",
    )
    assert (await stand.refactorings.propose(Wanted(replicas=2))).check.moves == ("replica 3 drains and ends",)
    await stand.scaled(Wanted(replicas=2, on=1))
    assert stand.fleet.serving == {2: 4, 3: 1}
    with pytest.raises(RefactoringRefused, match="there is no replica 1; there are 2, 3"):
        await stand.refactorings.propose(Wanted(replicas=1, on=1))


async def test_as_many_as_there_are_is_nothing_to_do(stand: ScaleStand) -> None:
    proposal = await stand.refactorings.start(Wanted(replicas=1))
    assert not isinstance(proposal, Started)
    assert proposal.check.sentences == ("1 replicas serve already",)


async def test_each_replica_is_rebalanced_by_itself_and_keeps_off_the_devices_of_others(stand: ScaleStand) -> None:
    await stand.scaled(Wanted(replicas=2, stages=1))
    record = await stand.scaled(Wanted(layout="1", on=1))
    assert record.what == "2 -> 1 stages"
    refused = await stand.refactorings.propose(Wanted(layout="4", on=1))
    assert (refused.check.feasible, refused.check.sentences) == (False, ("cpu:2 has a stage of another replica",))
    assert stand.layouts == {1: ("cpu:0",), 2: ("cpu:2",)}
    await stand.scaled(Wanted(stages=4, on=2, replica=True))
    assert stand.layouts == {1: ("cpu:0",), 2: ("cpu:1", "cpu:2", "cpu:3", "cpu:4")}


async def test_a_replica_that_does_not_start_is_told_and_the_others_serve(stand: ScaleStand) -> None:
    stand.workshop.start_failures = [None, "no room"]
    record = await stand.scaled(Wanted(replicas=3))
    assert record.result is HandoverResult.ABORTED
    assert record.message == (
        "a replica of 2 stages on cpu:4, cpu:5 did not start: no room; 2 replicas serve: 1 of 2 stages, 2 of 2 stages"
    )


async def test_it_is_cancelled_while_a_replica_starts(stand: ScaleStand) -> None:
    stand.workshop.gate = asyncio.Event()
    started = await stand.refactorings.start(Wanted(replicas=2))
    assert isinstance(started, Started)
    await until(lambda: len(stand.replicas.all) == 2)
    with pytest.raises(RefactoringBusy, match="1 -> 2 replicas, is in phase prepare"):
        await stand.refactorings.start(Wanted(replicas=3))
    assert await stand.refactorings.cancel()
    record = await stand.refactorings.ended(started)
    assert (record.result, record.message) == (
        HandoverResult.ABORTED,
        "cancelled; 1 replica serves: 1 of 2 stages",
    )
    assert len(stand.replicas.all) == 1


async def test_a_replica_that_starts_takes_no_request_and_one_that_drains_no_more(stand: ScaleStand) -> None:
    await stand.scaled(Wanted(replicas=2))
    second = stand.replicas.all[1]
    second.state = ReplicaState.DRAINING
    streams = await begun(stand, 3)
    assert len(stand.replicas.flights.at(stand.engine(0))) == 3
    assert set(await asyncio.gather(*streams)) == {await undisturbed()}


async def test_a_change_of_the_engine_wants_one_replica(stand: ScaleStand) -> None:
    await stand.scaled(Wanted(replicas=2))
    with pytest.raises(RefactoringRefused, match="flexctl scale --replicas 1 comes first"):
        await stand.refactorings.propose(Wanted(engine="vllm"))


async def test_a_restart_brings_all_replicas_back(stand: ScaleStand) -> None:
    keeper = IntentKeeper(basis={}, in_force=stand.in_force, intent=None)
    await stand.scaled(Wanted(replicas=2, stages=4))
    await stand.scaled(Wanted(replicas=3, stages=1))
    for event in stand.events.since(0):
        keeper.after(event)
    assert keeper.intent is not None
    assert [each.granularity for each in keeper.intent.pipelines] == [2, 4, 1]

    after = ScaleStand()
    await after.add(keeper.intent.pipelines[0])
    record = await after.refactorings.ended(after.refactorings.bring_back(keeper.intent.pipelines[1:]))
    assert (record.result, record.what) == (HandoverResult.DONE, "1 -> 3 replicas")
    assert after.layouts == stand.layouts
    await after.replicas.close()


async def test_while_replicas_come_back_nothing_else_changes_and_one_that_does_not_keeps_no_other(
    stand: ScaleStand,
) -> None:
    stand.workshop.gate = asyncio.Event()
    stand.workshop.start_failures = ["no room", None]
    started = stand.refactorings.bring_back([EvenResolver().beside(Wanted(), taken=frozenset(cpus)) for cpus in TAKEN])
    with pytest.raises(RefactoringBusy, match="1 -> 3 replicas, is starting"):
        await stand.refactorings.start(Wanted(replicas=2))
    with pytest.raises(RefactoringBusy):
        stand.refactorings.bring_back([even_pipeline(1)])
    stand.workshop.gate.set()
    record = await stand.refactorings.ended(started)
    assert (record.result, record.message) == (
        HandoverResult.ABORTED,
        "a replica of 1 stage on cpu:2 did not start: no room; 2 replicas serve: 1 of 2 stages, 3 of 1 stage",
    )
    assert stand.layouts == {1: ("cpu:0", "cpu:1"), 3: ("cpu:3",)}
