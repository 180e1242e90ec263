"""The dashboard over a real socket, with the fake engine behind it."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from engines.fake import FakeEngine
from flexpiped.admin_changes import Changes
from flexpiped.background import run_beside
from flexpiped.dashboard.feed import Feed, Sources
from flexpiped.dashboard.routes import Dashboard
from flexpiped.events import EventLog
from flexpiped.handover_records import Wanted
from flexpiped.hardware import Hardware
from flexpiped.keys import KeyRing
from flexpiped.load_monitor import LoadSampler
from flexpiped.refactoring import Refactorings
from flexpiped.servers import listen_tcp, serving, url_of
from flexpiped.settings import DashboardMode, DeviceSettings, Settings
from flexpiped.starting_app import starting_app
from flexpiped.status import DaemonStatus, Health, Identity, Latencies, ServiceState
from planner.layout import Pipeline
from planner.layout_file import parse_layout
from tests.support.admin import CannedPlans
from tests.support.clock import Clock
from tests.support.layouts import EvenResolver, even_pipeline


class FileResolver(EvenResolver):
    """Even cuts, but a layout is what its file says, as it is for the daemon."""

    def resolve(
        self,
        wanted: Wanted,
        *,
        current: Pipeline,
        resident: object = (),
        taken: frozenset[str] = frozenset(),
    ) -> Pipeline:
        if wanted.layout is not None:
            return parse_layout(wanted.layout)
        return super().resolve(wanted, current=current, resident=resident, taken=taken)


@dataclass(kw_only=True)
class DashboardStand:
    """A dashboard under test. ``mode`` and ``ring`` are in force at once; ``failures`` of the feed should be none."""

    engine: FakeEngine
    events: EventLog
    decisions: EventLog
    refactorings: Refactorings
    plans: CannedPlans
    status: DaemonStatus
    load: LoadSampler
    load_clock: Clock  # of the load alone, which stands still until a test sets it
    url: str = ""
    mode: DashboardMode = DashboardMode.CONTROL
    ring: KeyRing | None = None
    failures: list[str] = field(default_factory=list)
    feed: Feed


@asynccontextmanager
async def dashboard_stand(folder: Path, *, stages: int = 2, period_s: float = 0.02) -> AsyncIterator[DashboardStand]:
    """Serve the dashboard of a fake engine with ``stages`` stages on 127.0.0.1 and any free port."""
    engine = FakeEngine(pipeline=even_pipeline(stages))
    await engine.start(on_progress=lambda _: None)
    events, decisions, plans, clock = EventLog(), EventLog(), CannedPlans(), Clock()
    refactorings = Refactorings(engine=lambda: engine, resolver=FileResolver, events=events)
    status, load = _status(engine, refactorings), LoadSampler(clock=clock)
    sources = _sources(folder, status=status, load=load, events=events, decisions=decisions)
    feed = Feed(sources, period_s=period_s)
    stand = DashboardStand(
        engine=engine,
        events=events,
        decisions=decisions,
        refactorings=refactorings,
        plans=plans,
        status=status,
        load=load,
        load_clock=clock,
        feed=feed,
    )
    pages = Dashboard(
        feed=feed,
        changes=Changes(refactorings=refactorings, events=events, plans=plans),
        mode=lambda: stand.mode,
        keys=lambda: stand.ring,
    ).routes()
    app = starting_app(lambda: Health(state=ServiceState.READY), keys=lambda: stand.ring, further=pages)
    listener = listen_tcp("127.0.0.1", 0)
    stand.url = url_of(listener)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(engine.close)
        run_beside(stack, feed.run_forever(), name="dashboard-feed", on_failure=stand.failures.append)
        await stack.enter_async_context(serving(app, listener, shutdown_s=1.0))
        stack.push_async_callback(refactorings.close)
        stack.callback(feed.close, "the test ends")
        yield stand
    assert stand.failures == []


def _status(engine: FakeEngine, refactorings: Refactorings) -> DaemonStatus:
    return DaemonStatus(
        identity=Identity(model_name="demo", model_path="/srv/demo", api_url="http://127.0.0.1:1/v1"),
        engine_name=lambda: engine.capabilities.name,
        health=lambda: Health(state=ServiceState.READY),
        engine=lambda: engine,
        refactorings=refactorings,
        latencies=lambda: Latencies(ttft=None, tpot=None),
    )


def _sources(
    folder: Path, *, status: DaemonStatus, load: LoadSampler, events: EventLog, decisions: EventLog
) -> Sources:
    hardware = Hardware(
        Settings(devices=DeviceSettings(cpu_count=8)), python=sys.executable, state=folder / "links.json"
    )
    return Sources(
        status=status,
        models=lambda: ("demo",),
        tokens_per_s=lambda _model: status.tokens_per_s,
        load=lambda _model: load.observe(),
        events=events,
        decisions=decisions,
        topology=hardware.look,
    )


async def messages_of(answer: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """Yield topic and data of each server-sent event until the stream ends."""
    topic = ""
    async for line in answer.content:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            topic = value
        elif name == "data":
            yield topic, json.loads(value)
