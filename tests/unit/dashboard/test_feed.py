"""What one of several dashboards is told: of its model, and of no other one."""

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engines.closing import closing
from flexpiped.background import run_beside
from flexpiped.dashboard.feed import Feed, Sources
from flexpiped.dashboard.messages import Topic
from flexpiped.events import EventKind, EventLog
from flexpiped.hardware import Hardware
from flexpiped.load_monitor import LoadSampler
from flexpiped.settings import DeviceSettings, Settings

pytestmark = pytest.mark.real_loop


class Two:
    """The status of two models."""

    async def status(self) -> dict[str, Any]:
        models = [{"model": {"name": name}} for name in ("a", "b")]
        return models[0] | {"models": models}


@pytest.fixture
def decisions() -> EventLog:
    return EventLog()


@pytest_asyncio.fixture
async def feed(tmp_path: Path, decisions: EventLog) -> AsyncIterator[Feed]:
    settings = Settings(devices=DeviceSettings(cpu_count=2))
    hardware = Hardware(settings, python=sys.executable, state=tmp_path / "links.json")
    rates = {"a": 1.0, "b": 2.0}
    sources = Sources(
        status=Two(),
        models=lambda: ("a", "b"),
        tokens_per_s=rates.__getitem__,
        load=lambda _model: LoadSampler().observe(),
        events=EventLog(),
        decisions=decisions,
        topology=hardware.look,
    )
    feed, failures = Feed(sources, period_s=0.02), list[str]()
    async with AsyncExitStack() as stack:
        run_beside(stack, feed.run_forever(), name="feed", on_failure=failures.append)
        yield feed
    assert failures == []


async def first_of(feed: Feed, decisions: EventLog, model: str, topic: Topic) -> Any:
    async with closing(feed.watch(model)) as messages:
        async for message in messages:
            if message.topic is Topic.HELLO:
                for name in ("a", "b"):
                    decisions.publish(EventKind.DECISION, f"keep: {name}", model=name, verb="keep")
            if message.topic is topic:
                return message.data
    raise AssertionError("it ended")


async def test_each_is_told_of_its_own_model(feed: Feed, decisions: EventLog) -> None:
    for model, name, rate in (("", "a", 1.0), ("b", "b", 2.0), ("gone", "a", 1.0)):
        hello = await first_of(feed, decisions, model, Topic.HELLO)
        assert hello["status"]["model"]["name"] == name
        assert {each["message"] for each in hello["decisions"]} <= {f"keep: {name}"}
        assert (await first_of(feed, decisions, model, Topic.DECISION))["message"] == f"keep: {name}"
        assert (await first_of(feed, decisions, model, Topic.POINT))["tokens_per_s"] == rate
