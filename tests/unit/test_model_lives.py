"""How a model gives way: what is broken off leaves nothing behind."""

import asyncio
from typing import Any, cast

import pytest

from flexpiped.api.backend import Uses
from flexpiped.api.metrics import Metrics
from flexpiped.model_entry import Entry
from flexpiped.model_lives import ModelLives
from flexpiped.model_settings import ModelSpec
from flexpiped.settings import EngineKind, Settings


class Told:
    """Stands for what serves a model, and remembers what it was told."""

    drain_deadline_s = 5.0

    def __init__(self) -> None:
        self.told: list[str] = []

    name = "a"

    def begin_drain(self, _reason: str, *, closed_because: str) -> None:
        assert closed_because == "model a is being stopped"
        self.told.append("drain")

    async def end_control(self) -> None:
        self.told.append("end control")

    async def close(self) -> None:
        self.told.append("close")

    def holds(self) -> dict[str, int]:
        return {"cpu:0": 7}


class Used:
    """A backend of which only its uses are asked."""

    def __init__(self) -> None:
        self.uses = Uses()


def stand() -> tuple[ModelLives, Entry, Told, Used]:
    spec = ModelSpec(table="a", settings=Settings(engine=EngineKind.FAKE))
    service, backend = Told(), Used()
    entry = Entry(name="a", configured=spec, spec=spec, metrics=Metrics())
    entry.service, entry.backend = cast("Any", service), cast("Any", backend)
    lives = ModelLives({"a": entry}, make=cast("Any", None), serve=cast("Any", None), on_all_given_up=pytest.fail)
    return lives, entry, service, backend


async def test_a_model_stops_once_its_requests_are_answered_and_holds_its_devices_until_then() -> None:
    lives, entry, service, backend = stand()
    with backend.uses.one():
        stopping = asyncio.create_task(lives.stop(entry))
        await asyncio.sleep(1.0)
        assert service.told == ["drain", "end control"]
        assert (entry.service, lives.held_beside(None)) == (None, {"cpu:0": 7})
    assert await stopping == "every request was answered"
    assert service.told[-1] == "close"
    assert lives.held_beside(None) == {}


async def test_what_is_late_is_cut_off_and_counted() -> None:
    lives, entry, service, backend = stand()
    with backend.uses.one(), backend.uses.one():
        assert await lives.stop(entry, 2.0) == "2 requests were cut off at the deadline"
    assert service.told[-1] == "close"


async def test_a_stop_that_is_broken_off_ends_the_engine() -> None:
    lives, entry, service, backend = stand()
    with backend.uses.one():
        stopping = asyncio.create_task(lives.stop(entry))
        await asyncio.sleep(1.0)
        stopping.cancel()
        await asyncio.wait([stopping])
    assert service.told == ["drain", "end control", "close"]
    assert lives.services == ()
