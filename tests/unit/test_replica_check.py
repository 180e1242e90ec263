"""When a second instance is the way to another layout, why, and whether there is room for both."""

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import RefactorCheck
from flexpiped.events import EventLog
from flexpiped.handover_records import Wanted, Way
from flexpiped.refactoring import Refactorings
from flexpiped.replica_check import check_replica, why_replica
from planner.layout import Stage
from tests.support.layouts import EvenResolver, even_pipeline
from topology.units import MIB

IN_PLACE = RefactorCheck(feasible=True, sentences=("everything fits",))
TOO_FEW_RANKS = RefactorCheck(feasible=False, sentences=("2 ranks are resident",), needs_replica=True)
NO_ROOM = RefactorCheck(feasible=False, sentences=("needs 9 of 4 MiB",))
RIGID = replace(FAKE_CAPABILITIES, refactors_in_place=False)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    yield engine
    await engine.close()


@pytest.mark.parametrize(
    ("wanted", "capabilities", "check", "why"),
    [
        pytest.param(Wanted(stages=4), FAKE_CAPABILITIES, IN_PLACE, None, id="in place"),
        pytest.param(Wanted(stages=4), FAKE_CAPABILITIES, NO_ROOM, None, id="no room"),
        pytest.param(Wanted(stages=4, replica=True), FAKE_CAPABILITIES, IN_PLACE, "it was asked for", id="asked for"),
        pytest.param(Wanted(stages=4), FAKE_CAPABILITIES, TOO_FEW_RANKS, "2 ranks are resident", id="more ranks"),
        pytest.param(
            Wanted(stages=4),
            RIGID,
            RefactorCheck(feasible=False, sentences=("LoRA cannot be moved",)),
            "LoRA cannot be moved",
            id="the engine cannot, and says why",
        ),
        pytest.param(
            Wanted(stages=4),
            RIGID,
            RefactorCheck(feasible=False, sentences=()),
            "fake does not change its layout in place",
            id="the engine cannot",
        ),
    ],
)
def test_why(wanted: Wanted, capabilities: object, check: RefactorCheck, why: str | None) -> None:
    assert why_replica(wanted, capabilities=capabilities, check=check) == why  # type: ignore[arg-type]


async def test_room_for_both_is_said_with_the_numbers(engine: FakeEngine) -> None:
    check = await check_replica(engine, even_pipeline(4), resolver=EvenResolver(), check=TOO_FEW_RANKS, why="so")
    assert check.feasible
    assert check.moves == ("by a second instance on cpu:0, cpu:1, cpu:2, cpu:3, as so",)
    assert check.sentences[0].startswith("needs 2.1 of 60 MiB free on cpu:0: 2 MiB weights, 128 KiB KV (0 B live)")


async def test_both_must_fit_where_one_would(engine: FakeEngine) -> None:
    """In place nothing would be needed on cpu:0; a second instance needs its share of the weights again."""
    small = EvenResolver(memory_bytes=5 * MIB)
    check = await check_replica(engine, even_pipeline(4), resolver=small, check=IN_PLACE, why="it was asked for")
    assert not check.feasible
    assert check.sentences[0].endswith("as it was asked for: no room beside the first")
    assert check.sentences[1].startswith("needs 2.1 of 0.8 MiB free on cpu:0, 1.4 MiB too few")


async def test_a_layout_that_no_instance_could_have_is_refused(engine: FakeEngine) -> None:
    whole = even_pipeline(1)
    pair = replace(whole, stages=(Stage(device_ids=("cpu:0", "cpu:1"), first_decoder=0, end_decoder=8),))
    check = await check_replica(engine, pair, resolver=EvenResolver(), check=NO_ROOM, why="it was asked for")
    assert (check.feasible, check.sentences) == (False, ("this engine runs one device per stage",))
    nine = even_pipeline(9, num_decoders=9)
    check = await check_replica(engine, nine, resolver=EvenResolver(), check=NO_ROOM, why="it was asked for")
    assert check.sentences == ("the model has 8 decoders, the layout 9",)


async def test_without_second_instances_the_engine_decides_alone() -> None:
    engine = FakeEngine(pipeline=even_pipeline(2), resident_ranks=2)
    await engine.start(on_progress=lambda _: None)
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=EventLog())
    proposal = await refactorings.propose(Wanted(stages=4, replica=True))
    assert (proposal.way, proposal.check.feasible) == (Way.IN_PLACE, False)
    await engine.close()


async def test_the_layout_in_force_is_nothing_to_do_for_a_replica_either(engine: FakeEngine) -> None:
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=EventLog())
    assert not (await refactorings.propose(Wanted(stages=2, replica=True))).changes_something
