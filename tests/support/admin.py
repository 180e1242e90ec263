"""An admin API on a real Unix socket, with the fake engine behind it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from engines.fake import FakeEngine
from flexpiped.admin import admin_app
from flexpiped.events import EventLog
from flexpiped.refactoring import Refactorings
from flexpiped.servers import serving_admin
from flexpiped.status import DaemonStatus, Health, Identity, Latencies, Percentiles, ServiceState
from tests.support.layouts import EvenResolver, even_pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminStand:
    socket: Path
    engine: FakeEngine
    events: EventLog
    refactorings: Refactorings


@asynccontextmanager
async def admin_stand(folder: Path, *, stages: int = 2) -> AsyncIterator[AdminStand]:
    """Serve the admin API of a fake engine with ``stages`` stages at ``folder/admin.sock``."""
    engine = FakeEngine(pipeline=even_pipeline(stages))
    await engine.start(on_progress=lambda _: None)
    events = EventLog()
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=events)
    status = DaemonStatus(
        identity=Identity(model_name="demo", model_path="/srv/demo", engine="fake", api_url="http://127.0.0.1:1/v1"),
        health=lambda: Health(state=ServiceState.READY),
        engine=lambda: engine,
        refactorings=refactorings,
        latencies=lambda: Latencies(ttft=Percentiles(p50_s=0.02, p99_s=0.05), tpot=None),
    )
    app = admin_app(status=status, refactorings=refactorings, events=events)
    async with serving_admin(app, folder / "admin.sock"):
        yield AdminStand(socket=folder / "admin.sock", engine=engine, events=events, refactorings=refactorings)
        events.close()
        await refactorings.close()
    await engine.close()
