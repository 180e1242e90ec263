"""What should be running follows from events, and stands until the configuration says something else."""

import json
from dataclasses import replace

import pytest

from flexpiped.events import Event, EventKind
from flexpiped.handover_records import pipeline_to_wire
from flexpiped.intent import (
    FRUITLESS_STARTS,
    InForce,
    Intent,
    IntentKeeper,
    InvalidIntent,
    basis_of,
    intent_from_json,
    intent_to_wire,
    objection,
)
from flexpiped.settings import EngineKind, Settings
from planner.layout import Pipeline
from tests.support.layouts import even_pipeline

BASIS = basis_of(Settings())
INTENT = Intent(engine="fake", pipelines=(even_pipeline(4),), basis=BASIS, reason="asked for", since_unix_s=1.0)


class Running:
    """What is in force, for a keeper to ask: replicas are numbered from 1."""

    def __init__(self, engine: str, *pipelines: Pipeline) -> None:
        self.now = InForce(engine=engine, pipelines=dict(enumerate(pipelines, start=1)))

    def __call__(self) -> InForce:
        return self.now


def event(state: str, **fields: object) -> Event:
    return Event(
        sequence=1,
        time_unix_s=7.0,
        kind=EventKind.REFACTORING,
        message="plan: 2 -> 4 stages",
        fields={"state": state, **fields},
    )


def plan(target: Pipeline, engine_after: str | None = None) -> Event:
    return event("plan", target=pipeline_to_wire(target), engine_after=engine_after)


def scale(*, add: tuple[Pipeline, ...] = (), remove: tuple[int, ...] = ()) -> Event:
    moving = {"add": [pipeline_to_wire(each) for each in add], "remove": list(remove)}
    return event("plan", target=pipeline_to_wire(even_pipeline(2)), scale=moving)


def keeper(running: Running) -> IntentKeeper:
    return IntentKeeper(basis=BASIS, in_force=running, intent=None)


def test_what_is_asked_for_is_intended_before_it_is_there() -> None:
    intent = keeper(Running("fake", even_pipeline(2))).after(plan(even_pipeline(4)))

    assert intent == replace(INTENT, reason="asked for: 2 -> 4 stages", since_unix_s=7.0)


def test_what_was_rolled_back_is_intended_no_more() -> None:
    running = Running("fake", even_pipeline(2))
    kept = keeper(running)
    kept.after(plan(even_pipeline(4)))

    intent = kept.after(event("ended"))

    assert intent is not None
    assert intent.pipeline == even_pipeline(2)


def test_what_was_carried_out_stays_intended() -> None:
    running = Running("fake", even_pipeline(2))
    kept = keeper(running)
    first = kept.after(plan(even_pipeline(4)))
    running.now = InForce(engine="fake", pipelines={1: even_pipeline(4)})

    assert kept.after(event("ended")) is None
    assert kept.intent == first


def test_another_engine_is_part_of_it() -> None:
    intent = keeper(Running("native", even_pipeline(2))).after(plan(even_pipeline(2), engine_after="vllm"))

    assert intent is not None
    assert intent.engine == "vllm"


def test_replicas_that_are_asked_for_are_intended_before_they_are_there_and_no_more_when_they_leave() -> None:
    running = Running("fake", even_pipeline(2))
    kept = keeper(running)
    come = kept.after(scale(add=(even_pipeline(1), even_pipeline(4))))
    assert come is not None
    assert come.pipelines == (even_pipeline(2), even_pipeline(1), even_pipeline(4))

    running.now = InForce(engine="fake", pipelines={1: even_pipeline(2), 3: even_pipeline(1)})
    some = kept.after(event("ended"))
    assert some is not None
    assert some.pipelines == (even_pipeline(2), even_pipeline(1))

    left = kept.after(scale(remove=(1,)))
    assert left is not None
    assert left.pipelines == (even_pipeline(1),)


def test_another_layout_of_one_replica_leaves_the_others() -> None:
    kept = keeper(Running("fake", even_pipeline(2), even_pipeline(1)))
    second = kept.after(event("plan", target=pipeline_to_wire(even_pipeline(4)), on=2))
    main = kept.after(event("plan", target=pipeline_to_wire(even_pipeline(8)), on=None))

    assert second is not None
    assert second.pipelines == (even_pipeline(2), even_pipeline(4))
    assert main is not None
    assert main.pipelines == (even_pipeline(8), even_pipeline(1))


def test_other_events_change_nothing() -> None:
    kept = keeper(Running("fake", even_pipeline(2)))

    assert kept.after(event("progress")) is None
    assert kept.after(replace(plan(even_pipeline(4)), kind=EventKind.DAEMON)) is None


@pytest.mark.parametrize("further", [(), (even_pipeline(2), even_pipeline(1))])
def test_it_comes_back_from_json_as_it_was(further: tuple[Pipeline, ...]) -> None:
    intent = replace(INTENT, pipelines=(even_pipeline(4), *further))
    assert intent_from_json(json.dumps(intent_to_wire(intent))) == intent


def test_what_an_older_version_wrote_is_one_replica() -> None:
    wire = intent_to_wire(INTENT)
    del wire["further_replicas"]
    assert intent_from_json(json.dumps(wire)) == INTENT


@pytest.mark.parametrize("text", ["", "{}", json.dumps(intent_to_wire(INTENT) | {"stages": []})])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidIntent):
        intent_from_json(text)


def test_the_configuration_has_the_last_word() -> None:
    now = basis_of(Settings(stages=3, engine=EngineKind.VLLM))

    assert objection(INTENT, basis=BASIS, fruitless_starts=0) == ""
    assert objection(INTENT, basis=now, fruitless_starts=0) == (
        'engine was "native" and is "vllm" in the configuration now'
    )


def test_it_is_given_up_when_it_never_gets_ready() -> None:
    assert "3 starts" in objection(INTENT, basis=BASIS, fruitless_starts=FRUITLESS_STARTS)


def test_adopted_engines_have_the_layouts_that_they_say() -> None:
    kept = keeper(Running("fake", even_pipeline(2)))
    kept.intent = INTENT
    found = [pipeline_to_wire(even_pipeline(2)), pipeline_to_wire(even_pipeline(1))]
    intent = kept.after(event("adopted", engine="fake", pipelines=found))
    assert intent is not None
    assert intent.pipelines == (even_pipeline(2), even_pipeline(1))
    assert kept.after(event("adopted", engine="fake", pipelines=found)) is None
