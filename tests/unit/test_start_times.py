"""Starts are measured, kept over restarts of the daemon, and said again to policy and simulator."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engines.errors import EngineStartFailed
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.protocol import GenerationRequest, TokenChunk
from flexpiped.engine_factory import find_files
from flexpiped.offline_plan import OfflineRequest, measured_starts
from flexpiped.settings import Settings
from flexpiped.simulation.scenario import start_times
from flexpiped.start_times import StartMeter, StartTimes, start_times_of
from flexpiped.supervisor import Supervisor
from planner.layout import Pipeline
from planner.start_times import ExpectedStart, Origin, StartRecord
from tests.support.clock import Clock
from tests.support.graphs import SMALL_LLAMA, graph_of
from tests.support.layouts import even_pipeline
from tests.support.until import until
from topology.units import GIB

DEMO = Path(__file__).parents[2] / "etc" / "demo-model"
GRAPH = graph_of(SMALL_LLAMA)


def known_in(folder: Path, *, engine: str = "fake", share: float = 1.0) -> StartTimes:
    found = start_times_of(GRAPH, DEMO, engine=engine, state_folder=folder, device_name="a processor")

    def cached_share(files: Sequence[Path]) -> float:
        assert [file.name for file in files] == ["model.safetensors"]
        return share

    return replace(found, cached_share=cached_share)


def record(
    took_s: float, *, num_stages: int = 2, origin: Origin = Origin.PAGE_CACHE, trial_s: float | None = None
) -> StartRecord:
    return StartRecord(num_stages=num_stages, origin=origin, took_s=took_s, trial_s=trial_s)


def took_s(starts: StartTimes) -> float:
    found = starts.expected(2)
    assert found is not None
    return found.took_s


def test_they_are_kept_by_engine_and_come_back(tmp_path: Path) -> None:
    known_in(tmp_path).note(record(2.0))
    known_in(tmp_path).note(record(4.0))
    assert known_in(tmp_path).records == (record(2.0), record(4.0))
    assert took_s(known_in(tmp_path)) == 3.0
    assert known_in(tmp_path, engine="vllm").expected(2) is None


def test_a_start_is_expected_as_warm_as_the_files_are_now_else_as_any(tmp_path: Path) -> None:
    known_in(tmp_path).note(record(30.0, origin=Origin.STORAGE))
    assert took_s(known_in(tmp_path)) == 30.0
    known_in(tmp_path).note(record(2.0))
    assert took_s(known_in(tmp_path, share=0.9)) == 2.0
    assert took_s(known_in(tmp_path, share=0.1)) == 30.0
    known_in(tmp_path).note(record(1.0, origin=Origin.KEPT))
    kept = replace(known_in(tmp_path, share=0.1), kept_share=lambda: 0.5)
    assert kept.expected(2) == ExpectedStart(took_s=1.0, origin=Origin.KEPT, cold_s=30.0)


def test_what_cannot_be_read_is_measured_again_and_what_cannot_be_kept_is_told(tmp_path: Path) -> None:
    known = known_in(tmp_path)
    known.note(record(1.0))
    known.file.write_text("half a fi")
    assert known.records == ()
    (tmp_path / "file").touch()
    with capture_logs() as logs:
        known_in(tmp_path / "file").note(record(1.0))
    assert [each["event"] for each in logs] == ["start time not kept"]


class SlowEngine(FakeEngine):
    """Takes three seconds of the test's clock for each stage."""

    clock = Clock()

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        self.clock.now_s += 3.0 * self.pipeline.granularity
        await super().start(on_progress=on_progress)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.clock.now_s += 0.5
        async for chunk in super().generate(request):
            yield chunk


async def test_every_start_is_measured_but_none_that_failed(tmp_path: Path) -> None:
    clock, engines, failure = Clock(), list[SlowEngine](), list[str | None]()
    known = known_in(tmp_path)

    def make(pipeline: Pipeline, epoch: int) -> SlowEngine:
        engine = SlowEngine(pipeline=pipeline, epoch=epoch, start_failure=failure.pop(0) if failure else None)
        engine.clock = clock
        engines.append(engine)
        return engine

    meter = StartMeter(starts=lambda name: {"fake": known}[name], origins=lambda: {"fake": known.origin}, clock=clock)
    supervisor = Supervisor(factory=make, pipeline=even_pipeline(1), sleep=lambda _s: asyncio.sleep(0), meter=meter)
    await supervisor.start()
    failure = ["no room"]
    engines[0].kill("killed by a test")
    await until(lambda: len(engines) == 3 and supervisor.engine is engines[2])
    await supervisor.start_second(even_pipeline(4), on_progress=lambda _said: None)
    await supervisor.close()
    tried = record(12.0, num_stages=4, trial_s=2.5)  # by five short requests
    assert known.records == (record(3.0, num_stages=1), record(3.0, num_stages=1), tried)

    compiling = replace(FAKE_CAPABILITIES, compiles_at_first_use=True)
    first = Supervisor(
        factory=lambda pipeline, _epoch: SlowEngine(pipeline=pipeline, capabilities=compiling),
        pipeline=even_pipeline(1),
        meter=StartMeter(starts=lambda _name: known, origins=lambda: {"fake": Origin.STORAGE}, clock=SlowEngine.clock),
    )
    await first.start()
    await first.close()
    assert known.records[-1] == record(3.0, num_stages=1, trial_s=2.5, origin=Origin.STORAGE)

    failure = ["no room"]
    with pytest.raises(EngineStartFailed):
        await Supervisor(factory=make, pipeline=even_pipeline(1), meter=meter).start()
    assert len(known.records) == 4


def test_a_simulation_of_this_host_takes_what_was_measured_here(tmp_path: Path) -> None:
    request = OfflineRequest(model=str(DEMO))
    assert measured_starts(request, state_folder=tmp_path) == ()
    graph = find_files(Settings(), source=str(DEMO)).graph
    start_times_of(graph, DEMO, engine="native", state_folder=tmp_path).note(record(5.0))
    assert measured_starts(request, state_folder=tmp_path) == (record(5.0),)
    assert measured_starts(replace(request, topology="8xl40s-pcie"), state_folder=tmp_path) == ()


@pytest.mark.parametrize(
    ("known", "cold_s", "warm_s"),
    [
        ((), 11.737, 1.537),  # 10 GiB at 1 and at 20 GB/s, and a second for processes
        ((record(5.0),), 15.2, 5.0),
        ((record(20.0, origin=Origin.STORAGE),), 20.0, 9.8),
        ((record(5.0), record(20.0, origin=Origin.STORAGE)), 20.0, 5.0),
    ],
)
def test_what_was_not_measured_is_estimated(known: tuple[StartRecord, ...], cold_s: float, warm_s: float) -> None:
    found = start_times(known, num_stages=2, weight_bytes=10 * GIB)
    assert found == pytest.approx((cold_s, warm_s), rel=1e-3)
