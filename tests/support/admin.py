"""An admin API on a real Unix socket, with the fake engine behind it."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from engines.errors import EngineDied
from engines.fake import FakeEngine
from engines.protocol import Engine
from flexpiped.admin import admin_app
from flexpiped.admin_auto import auto_routes
from flexpiped.admin_changes import Changes
from flexpiped.auto import AutoControl
from flexpiped.config_values import Auto
from flexpiped.events import EventLog
from flexpiped.hardware import Hardware
from flexpiped.refactoring import Refactorings
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.servers import serving_at
from flexpiped.settings import DeviceSettings, Settings
from flexpiped.status import DaemonStatus, Health, Identity, Latencies, Percentiles, ServiceState
from flexpiped.supervisor import Supervisor
from planner.arrivals import ArrivalStatistics
from tests.support.layouts import EvenResolver, even_pipeline
from topology.units import MIB


class CannedPlans:
    """A ``PlanSource`` that answers the same plan for any question, and keeps what was asked."""

    ANSWER: ClassVar[dict[str, Any]] = {
        "state": "infeasible",
        "reason": "needs 141 GiB, the largest set of 2 free devices offers 96 GiB",
        "times_from": "made up for a test",
        "took_s": 0.01,
        "workload": {"rate_per_s": 1.0, "cv": 1.0, "prompt_tokens_mean": 2.0, "output_tokens_mean": 3.0},
        "slo": {"ttft_s": None, "tpot_s": None},
        "candidates": [],
    }

    def __init__(self) -> None:
        self.asked: list[int | Auto] = []

    async def plan(self, stages: int | Auto) -> dict[str, Any]:
        self.asked.append(stages)
        return self.ANSWER


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminStand:
    socket: Path
    engine: FakeEngine
    events: EventLog
    refactorings: Refactorings
    status: DaemonStatus


@asynccontextmanager
async def admin_stand(
    folder: Path,
    *,
    stages: int = 2,
    cpu_count: int = 8,
    max_running: int = 256,
    arrivals: Sequence[ArrivalStatistics] = (),
) -> AsyncIterator[AdminStand]:
    """Serve the admin API of a fake engine with ``stages`` stages at ``folder/admin.sock``."""
    engine = FakeEngine(pipeline=even_pipeline(stages), max_running=max_running)
    await engine.start(on_progress=lambda _: None)
    events = EventLog()
    refactorings = Refactorings(engine=lambda: engine, resolver=EvenResolver, events=events)
    status = admin_status(lambda: engine, refactorings=refactorings, arrivals=arrivals)
    async with serving_admin(folder, status, events=events, refactorings=refactorings, cpu_count=cpu_count):
        yield AdminStand(
            socket=folder / "admin.sock", engine=engine, events=events, refactorings=refactorings, status=status
        )
    await engine.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStand:
    socket: Path
    supervisor: Supervisor
    events: EventLog
    refactorings: Refactorings
    may_start: asyncio.Event  # what a second instance waits for

    @property
    def engine(self) -> Engine:
        """The one in force."""
        if self.supervisor.engine is None:
            raise EngineDied(self.supervisor.supervision.reason)
        return self.supervisor.engine


@asynccontextmanager
async def replica_stand(
    folder: Path, *, stages: int = 2, resident_ranks: int = 2, memory_bytes: int = 64 * MIB
) -> AsyncIterator[ReplicaStand]:
    """Serve the admin API of a supervised fake engine that has only ``resident_ranks`` ranks."""
    may_start = asyncio.Event()
    may_start.set()

    class Gated(FakeEngine):
        async def start(self, *, on_progress: Callable[[str], None]) -> None:
            on_progress("waiting for the gate")
            await may_start.wait()
            await super().start(on_progress=on_progress)

    supervisor = Supervisor(
        factory=lambda pipeline, epoch: Gated(pipeline=pipeline, epoch=epoch, resident_ranks=resident_ranks),
        pipeline=even_pipeline(stages),
    )
    await supervisor.start()
    events = EventLog()
    refactorings = Refactorings(
        engine=lambda: stand.engine,
        resolver=lambda: EvenResolver(memory_bytes=memory_bytes),
        events=events,
        replica=lambda target, _on: ReplicaRunner(supervisor, target),
    )
    stand = ReplicaStand(
        socket=folder / "admin.sock",
        supervisor=supervisor,
        events=events,
        refactorings=refactorings,
        may_start=may_start,
    )
    status = admin_status(lambda: stand.engine, refactorings=refactorings)
    async with serving_admin(folder, status, events=events, refactorings=refactorings):
        yield stand
    await supervisor.close()


def admin_status(
    engine: Callable[[], Engine],
    *,
    refactorings: Refactorings,
    arrivals: Sequence[ArrivalStatistics] = (),
    auto: AutoControl | None = None,
) -> DaemonStatus:
    """Return what the daemon would say of an engine, and of automatic control if there is one."""
    return DaemonStatus(
        identity=Identity(model_name="demo", model_path="/srv/demo", api_url="http://127.0.0.1:1/v1"),
        engine_name=lambda: engine().capabilities.name,
        health=lambda: Health(state=ServiceState.READY),
        engine=engine,
        refactorings=refactorings,
        latencies=lambda: Latencies(ttft=Percentiles(p50_s=0.02, p99_s=0.05), tpot=None),
        arrivals=lambda: arrivals,
        auto=lambda: None if auto is None else {"mode": auto.mode.value, "decision": auto.last},
    )


@asynccontextmanager
async def serving_admin(
    folder: Path,
    status: DaemonStatus,
    *,
    events: EventLog,
    refactorings: Refactorings,
    cpu_count: int = 8,
    auto: AutoControl | None = None,
) -> AsyncIterator[None]:
    """Serve the admin API at ``folder/admin.sock``, with automatic control if there is one."""
    hardware = Hardware(
        Settings(devices=DeviceSettings(cpu_count=cpu_count)), python=sys.executable, state=folder / "links.json"
    )
    changes = Changes(refactorings=refactorings, events=events, plans=CannedPlans())
    further = () if auto is None else tuple(auto_routes(lambda _request: auto, events=events))
    app = admin_app(status=status, changes=changes, events=events, hardware=hardware, further=further)
    async with serving_at(app, folder / "admin.sock"):
        yield
        events.close()
        if auto is not None:
            auto.decided.close()
            await auto.close()
        await refactorings.close()
