"""A second instance takes over while requests run: nothing is lost, repeated or altered, and nothing is left behind."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest
from structlog.testing import capture_logs

from engines.closing import closing
from engines.errors import EngineDied, RefactoringAborted
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.fake_batch import hashed_tokens
from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, RefactorProgress, SamplingParams
from engines.restarts import RestartPolicy
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervision import SupervisorState
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits
from tests.support.layouts import even_pipeline
from tests.support.until import until

STREAMS = 32
TOKENS = 400
TWO, FOUR = even_pipeline(2), even_pipeline(4)
LIMITS = ReplicaLimits(start_deadline_s=60.0, pace_s=5.0, drain_deadline_s=5.0)


class GatedEngine(FakeEngine):
    """Its start waits for ``may_start``."""

    def __init__(self, may_start: asyncio.Event, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._may_start = may_start
        self.is_closed = False

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        on_progress("waiting for the gate")
        await self._may_start.wait()
        await super().start(on_progress=on_progress)

    @property
    def is_trying(self) -> bool:
        return bool(self._batch.waiting or self._batch.running)

    async def close(self) -> None:
        self.is_closed = True
        await super().close()


class Workshop:
    """Makes engines and remembers them. No time passes in it: delays are turns of the loop."""

    def __init__(self) -> None:
        self.engines: list[GatedEngine] = []
        self.start_failures: list[str | None] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.capabilities: EngineCapabilities = FAKE_CAPABILITIES
        self.max_running = 256

    def make(self, pipeline: Pipeline, epoch: int) -> GatedEngine:
        failure = self.start_failures.pop(0) if self.start_failures else None
        engine = GatedEngine(
            self.may_start,
            pipeline=pipeline,
            epoch=epoch,
            start_failure=failure,
            capabilities=self.capabilities,
            max_running=self.max_running,
        )
        self.engines.append(engine)
        return engine

    async def sleep(self, _duration_s: float) -> None:
        await asyncio.sleep(0)


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
async def supervisor(workshop: Workshop) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=5), sleep=workshop.sleep
    )
    await supervisor.start()
    yield supervisor
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


def request(index: int) -> GenerationRequest:
    """Greedy and seeded requests in turns."""
    return GenerationRequest(
        request_id=f"r{index}",
        prompt_token_ids=tuple(5 + (index * 37 + i) % 500 for i in range(3 + index % 7)),
        sampling=SamplingParams(max_tokens=TOKENS, temperature=0.9 * (index % 2), seed=index, ignore_eos=True),
    )


def undisturbed(index: int) -> list[int]:
    """Return the tokens that the request gets where nothing happens to it."""
    next_token = hashed_tokens(FAKE_CAPABILITIES.vocab_size)
    return [next_token(request(index), position) for position in range(TOKENS)]


@dataclass(eq=False)
class Streams:
    """Requests that run, and what each has got so far."""

    supervisor: Supervisor
    got: list[list[int]] = field(default_factory=list)
    ends: list[FinishReason | None] = field(default_factory=list)  # one for each stream that has ended
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def begin(self, count: int = STREAMS) -> None:
        for index in range(len(self.got), len(self.got) + count):
            self.got.append([])
            self.tasks.append(asyncio.create_task(self._read(index)))

    async def _read(self, index: int) -> None:
        async with closing(self.supervisor.generate(request(index))) as chunks:
            async for chunk in chunks:
                self.got[index].extend(chunk.token_ids)
                if chunk.finish_reason is not None:
                    self.ends.append(chunk.finish_reason)

    async def reach(self, count: int) -> None:
        """Return when every stream has got that many tokens."""
        await until(lambda: all(len(tokens) >= count for tokens in self.got))

    async def assert_exact(self) -> None:
        await asyncio.gather(*self.tasks)
        assert self.got == [undisturbed(index) for index in range(len(self.got))]
        assert self.ends == [FinishReason.LENGTH] * len(self.got)


@pytest.fixture
def streams(supervisor: Supervisor) -> Streams:
    return Streams(supervisor)


async def assert_idle(engine: FakeEngine, supervisor: Supervisor) -> None:
    counters = await engine.counters()
    assert (counters.running, counters.waiting, counters.kv_blocks_used) == (0, 0, 0)
    assert len(supervisor.flights) == 0


async def take_over(supervisor: Supervisor, target: Pipeline = FOUR) -> list[RefactorProgress]:
    return [report async for report in ReplicaRunner(supervisor, target, limits=LIMITS).run()]


def background(runner: ReplicaRunner) -> "asyncio.Task[list[RefactorProgress]]":
    async def collect() -> list[RefactorProgress]:
        return [report async for report in runner.run()]

    return asyncio.create_task(collect())


async def test_32_streams_lose_repeat_and_alter_nothing(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(10)
    reports = await take_over(supervisor)
    first, second = workshop.engines
    assert first.is_closed
    assert (supervisor.engine, supervisor.pipeline, supervisor.epoch) == (second, FOUR, 1)
    await streams.assert_exact()
    assert (reports[-1].phase, reports[-1].epoch) == (HandoverPhase.DONE, 1)
    assert reports[-1].message == "the second instance serves, 32 of 32 requests taken over: 32 computed again"
    assert reports[-1].requests_live == 32
    await assert_idle(second, supervisor)
    assert supervisor.supervision.reason == "the second instance serves, epoch 1"
    assert supervisor.supervision.deaths_total == 0


async def test_each_phase_is_reported_in_order(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(3)
    await streams.reach(5)
    said = [(report.phase.value, report.message) for report in await take_over(supervisor)]
    assert said == [
        ("prepare", "second instance: starting"),
        ("prepare", "second instance: waiting for the gate"),
        ("prepare", "second instance: starting the fake engine"),
        ("prepare", "second instance: ready"),
        ("sync", "switching over"),
        ("sync", "0 of 3 requests taken over"),
        ("sync", "1 of 3 requests taken over"),
        ("sync", "2 of 3 requests taken over"),
        ("commit", "3 of 3 requests taken over: 3 computed again"),
        ("retire", "the second instance serves, the first one ends"),
        ("done", "the second instance serves, 3 of 3 requests taken over: 3 computed again"),
    ]
    await streams.assert_exact()


async def test_new_requests_go_to_the_first_until_the_switch(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    streams.begin(4)
    await streams.reach(5)
    assert (await workshop.engines[0].counters()).running == 4
    workshop.may_start.set()
    await handing_over
    streams.begin(4)
    await streams.assert_exact()
    assert (await workshop.engines[1].counters()).generated_tokens_total > 4 * TOKENS


async def test_requests_that_wait_in_the_first_engine_go_over_too(workshop: Workshop) -> None:
    workshop.max_running = 4
    supervisor = Supervisor(factory=workshop.make, pipeline=TWO, sleep=workshop.sleep)
    await supervisor.start()
    streams = Streams(supervisor)
    streams.begin(12)
    await until(lambda: len(streams.got[0]) > 5)
    assert (await workshop.engines[0].counters()).waiting == 8
    workshop.engines[0].hold()  # else some end there while others wait, in real time, for a place at the second
    runner = ReplicaRunner(supervisor, FOUR, limits=replace(LIMITS, pace_s=0.001))
    last = [report async for report in runner.run()][-1]
    assert last.message == "the second instance serves, 12 of 12 requests taken over: 12 computed again"
    await streams.assert_exact()
    await supervisor.close()


async def test_a_reader_that_is_busy_elsewhere_holds_nothing_up(supervisor: Supervisor, workshop: Workshop) -> None:
    chunks = supervisor.generate(request(1))
    assert isinstance(chunks, AsyncIterator)
    got = [token for _ in range(5) for token in (await anext(chunks)).token_ids]
    await take_over(supervisor)
    assert workshop.engines[0].is_closed
    got += [token async for chunk in chunks for token in chunk.token_ids]
    assert got == undisturbed(1)


async def test_a_second_instance_that_does_not_start_changes_nothing(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.start_failures = ["no memory on cpu:3"]
    streams.begin()
    await streams.reach(10)
    with pytest.raises(RefactoringAborted, match="given up: no memory on cpu:3; the first instance serves on"):
        await take_over(supervisor)
    assert (supervisor.engine, supervisor.pipeline, supervisor.epoch) == (workshop.engines[0], TWO, 0)
    assert workshop.engines[1].is_closed
    await streams.assert_exact()
    await assert_idle(workshop.engines[0], supervisor)
    await take_over(supervisor)
    assert supervisor.pipeline == FOUR


async def test_it_is_tried_out_before_it_takes_over(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    streams.begin(1)
    await streams.reach(5)
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    first, second = workshop.engines
    second.hold()
    workshop.may_start.set()
    await until(lambda: second.is_trying)
    assert supervisor.engine is first
    second.kill("it cannot compute")
    with pytest.raises(RefactoringAborted, match="given up: it cannot compute; the first instance serves on"):
        await handing_over
    assert supervisor.engine is first
    await streams.assert_exact()


@pytest.mark.parametrize(
    ("capabilities", "why"),
    [
        (replace(FAKE_CAPABILITIES, max_model_len=256), "has a context of 256 tokens, the first 512"),
        (replace(FAKE_CAPABILITIES, vocab_size=1024), "has another vocabulary"),
    ],
)
async def test_a_second_instance_that_could_not_go_on_is_refused(
    supervisor: Supervisor, workshop: Workshop, capabilities: EngineCapabilities, why: str
) -> None:
    workshop.capabilities = capabilities
    with pytest.raises(RefactoringAborted, match=why):
        await take_over(supervisor)
    assert supervisor.engine is workshop.engines[0]


async def test_a_start_that_takes_too_long_is_given_up(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.may_start.clear()
    runner = ReplicaRunner(supervisor, FOUR, limits=replace(LIMITS, start_deadline_s=0.01))
    with pytest.raises(RefactoringAborted, match=r"not ready after 0\.01 s"):
        await background(runner)
    assert supervisor.engine is workshop.engines[0]


async def test_cancel_while_starting(supervisor: Supervisor, streams: Streams, workshop: Workshop) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    handing_over = background(runner)
    await until(lambda: len(workshop.engines) == 2)
    assert await runner.cancel()
    with pytest.raises(RefactoringAborted, match="cancelled; the first instance serves on, no request disturbed"):
        await handing_over
    assert not await runner.cancel()
    assert workshop.engines[1].is_closed
    await streams.assert_exact()
    await assert_idle(workshop.engines[0], supervisor)


async def test_a_cancellation_that_comes_with_the_word_ready_wins(supervisor: Supervisor, workshop: Workshop) -> None:
    """The second instance is ready, but the switch has not been made."""
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)

    async def cancel_late() -> None:
        async for report in runner.run():
            if report.message == "second instance: starting the fake engine":
                assert await runner.cancel()

    with pytest.raises(RefactoringAborted, match="cancelled"):
        await cancel_late()
    assert supervisor.engine is workshop.engines[0]
    assert workshop.engines[1].is_closed


async def test_cancelled_before_it_began(supervisor: Supervisor, workshop: Workshop) -> None:
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    assert await runner.cancel()
    with pytest.raises(RefactoringAborted, match="cancelled; the first instance serves on"):
        await background(runner)
    assert len(workshop.engines) == 1


async def test_past_the_switch_it_is_not_cancelled(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(4)
    await streams.reach(5)
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    answers = [await runner.cancel() async for report in runner.run() if report.phase is HandoverPhase.SYNCING]
    assert answers == [False] * 5
    assert supervisor.pipeline == FOUR
    await streams.assert_exact()


async def test_the_first_dies_while_the_second_starts(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    workshop.engines[0].kill("out of memory")
    await until(lambda: supervisor.supervision.state is SupervisorState.RECOVERING)
    assert supervisor.supervision.reason == (
        "the engine died (out of memory) while a second instance is starting, which takes over; requests wait"
    )
    workshop.may_start.set()
    last = (await handing_over)[-1]
    assert last.message.endswith("the first one died (out of memory)")
    assert last.requests_live == STREAMS
    await streams.assert_exact()
    assert len(workshop.engines) == 2
    assert supervisor.pipeline == FOUR
    workshop.engines[1].kill("again")  # it is watched
    assert (await supervisor.ready_engine(other_than=workshop.engines[1])).pipeline == FOUR


@pytest.mark.parametrize("how", ["fails", "cancelled"])
async def test_the_first_dies_and_the_second_does_not_come(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, how: str
) -> None:
    streams.begin()
    await streams.reach(5)
    workshop.may_start.clear()
    workshop.start_failures = ["no memory"]
    runner = ReplicaRunner(supervisor, FOUR, limits=LIMITS)
    handing_over = background(runner)
    await until(lambda: len(workshop.engines) == 2)
    workshop.engines[0].kill("killed")
    await until(lambda: supervisor.supervision.state is SupervisorState.RECOVERING)
    if how == "cancelled":
        assert await runner.cancel()
        await until(lambda: workshop.engines[1].is_closed)
    workshop.may_start.set()
    with pytest.raises(RefactoringAborted, match=r"ordinary recovery goes on; the first one died \(killed\)"):
        await handing_over
    await streams.assert_exact()
    assert len(workshop.engines) == 3
    assert (supervisor.pipeline, supervisor.epoch) == (TWO, 0)
    await assert_idle(workshop.engines[2], supervisor)


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "second"])
async def test_one_of_both_dies_during_the_take_over(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, victim: int
) -> None:
    streams.begin()
    await streams.reach(5)
    last: RefactorProgress | None = None
    async for last in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if last.message == "7 of 32 requests taken over":
            workshop.engines[victim].kill("killed")
    assert last is not None
    assert last.phase is HandoverPhase.DONE
    await streams.assert_exact()
    assert len(workshop.engines) == 2 + victim
    assert (supervisor.engine, supervisor.pipeline) == (workshop.engines[-1], FOUR)
    assert workshop.engines[0].is_closed
    await assert_idle(workshop.engines[-1], supervisor)


async def test_a_second_instance_that_dies_for_good_is_a_failure(workshop: Workshop) -> None:
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=1), sleep=workshop.sleep
    )
    await supervisor.start()
    streams = Streams(supervisor)
    streams.begin(4)
    await streams.reach(5)

    async def hand_over() -> None:
        async for report in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
            if report.message == "1 of 4 requests taken over":
                workshop.engines[1].kill("no device")

    with pytest.raises(EngineDied, match="at last: no device"):
        await hand_over()
    ends = await asyncio.gather(*streams.tasks, return_exceptions=True)
    # What had gone over is lost with its engine, the one under way perhaps; the others end at the first.
    assert (type(ends[0]), ends[2:]) == (EngineDied, [None, None])
    assert supervisor.supervision.state is SupervisorState.FAILED
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


async def test_hang_ups_during_the_take_over_leave_nothing_behind(
    supervisor: Supervisor, streams: Streams, workshop: Workshop
) -> None:
    streams.begin()
    await streams.reach(5)
    async for report in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if report.phase is HandoverPhase.SYNCING and report.message != "switching over":
            taken = int(report.message.split()[0])
            for task in streams.tasks[taken : taken + 2] + streams.tasks[-1:]:
                task.cancel()  # the one whose turn it is, and others
            streams.tasks.pop()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    await until(lambda: len(supervisor.flights) == 0)
    assert workshop.engines[0].is_closed
    await assert_idle(workshop.engines[1], supervisor)
    with capture_logs():
        assert len(await take_over(supervisor, TWO)) > 0


async def test_hang_ups_at_any_turn_leave_nothing_behind(workshop: Workshop) -> None:
    """The same with one hang-up, at each turn of the loop that a handover takes."""
    is_over = False
    for turns in range(60):
        supervisor = Supervisor(factory=workshop.make, pipeline=TWO, sleep=workshop.sleep)
        await supervisor.start()
        streams = Streams(supervisor)
        streams.begin(2)
        await streams.reach(3)
        handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
        for _ in range(turns):
            await asyncio.sleep(0)
        is_over = handing_over.done()
        streams.tasks[0].cancel()
        await handing_over
        await streams.tasks[1]
        assert streams.got[1] == undisturbed(1)
        await asyncio.wait(streams.tasks)
        await assert_idle(workshop.engines[-1], supervisor)
        await supervisor.close()
    assert is_over, "more turns are needed to come to the end of a handover"


@pytest.mark.parametrize("seed", range(8))
async def test_readers_at_any_pace_with_deaths_and_handovers_at_any_time(workshop: Workshop, seed: int) -> None:
    rng = random.Random(seed)
    supervisor = Supervisor(
        factory=workshop.make, pipeline=TWO, policy=RestartPolicy(max_deaths=99), sleep=workshop.sleep
    )
    await supervisor.start()
    got: list[list[int]] = [[] for _ in range(12)]

    async def read(index: int) -> None:
        """Read at a pace of its own; every third leaves early."""
        async with closing(supervisor.generate(request(index))) as chunks:
            async for chunk in chunks:
                got[index].extend(chunk.token_ids)
                if index % 3 == 0 and len(got[index]) > 40 * index:
                    return
                for _ in range(rng.randrange(index + 1)):
                    await asyncio.sleep(0)

    reading = asyncio.gather(*(read(index) for index in range(len(got))))
    while not reading.done():
        handing_over = background(
            ReplicaRunner(supervisor, even_pipeline(rng.randint(1, 8)), limits=replace(LIMITS, pace_s=0.001))
        )
        while not handing_over.done():
            await asyncio.sleep(0)
            if rng.random() < 0.02:
                rng.choice(workshop.engines[-2:]).kill("bad luck")
        await asyncio.gather(handing_over, return_exceptions=True)
        await supervisor.ready_engine()
    await reading
    for index, tokens in enumerate(got):
        assert tokens == undisturbed(index)[: len(tokens)]
        assert len(tokens) == TOKENS or index % 3 == 0
    await assert_idle(workshop.engines[-1], supervisor)
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)


async def test_back_to_back(supervisor: Supervisor, streams: Streams, workshop: Workshop) -> None:
    streams.begin()
    await streams.reach(5)
    for number, stages in enumerate((4, 1, 8, 2, 4), start=1):
        await take_over(supervisor, even_pipeline(stages))
        assert (supervisor.pipeline.granularity, supervisor.epoch) == (stages, number)
    await streams.assert_exact()
    assert [engine.is_closed for engine in workshop.engines] == [True] * 5 + [False]
    await assert_idle(workshop.engines[-1], supervisor)


async def test_a_request_that_ends_before_its_turn_is_not_counted(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(4)
    await streams.reach(5)
    last: RefactorProgress | None = None
    async for last in ReplicaRunner(supervisor, FOUR, limits=LIMITS).run():
        if last.message == "0 of 4 requests taken over":
            streams.tasks[3].cancel()
    assert last is not None
    assert last.message == "the second instance serves, 3 of 3 requests taken over: 3 computed again"
    await asyncio.wait(streams.tasks)


async def test_closing_the_supervisor_ends_both(supervisor: Supervisor, workshop: Workshop) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    await supervisor.close()
    assert all(engine.is_closed for engine in workshop.engines)
    handing_over.cancel()
    await asyncio.gather(handing_over, return_exceptions=True)


async def test_a_mistake_in_an_engine_ends_the_handover_and_nothing_else(
    supervisor: Supervisor, streams: Streams, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises what the protocol does not know, before the switch and after."""

    async def drain(_engine: FakeEngine) -> None:
        raise ZeroDivisionError

    async def start(_engine: FakeEngine, *, on_progress: Callable[[str], None]) -> None:
        raise ZeroDivisionError(on_progress)

    streams.begin(4)
    await streams.reach(5)
    with monkeypatch.context() as patched:
        patched.setattr(FakeEngine, "start", start)
        with pytest.raises(ZeroDivisionError):
            await background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    assert (supervisor.engine, workshop.engines[1].is_closed) == (workshop.engines[0], True)
    monkeypatch.setattr(FakeEngine, "drain", drain)
    with pytest.raises(ZeroDivisionError):
        await background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    assert (supervisor.engine, workshop.engines[0].is_closed) == (workshop.engines[2], True)
    await streams.assert_exact()


async def test_reports_that_nobody_reads_any_more_leave_no_second_instance(
    supervisor: Supervisor, workshop: Workshop
) -> None:
    workshop.may_start.clear()
    handing_over = background(ReplicaRunner(supervisor, FOUR, limits=LIMITS))
    await until(lambda: len(workshop.engines) == 2)
    handing_over.cancel()
    await asyncio.wait([handing_over])
    assert [engine.is_closed for engine in workshop.engines] == [False, True]
    assert supervisor.engine is workshop.engines[0]


async def test_the_route_of_each_request_is_logged(supervisor: Supervisor, streams: Streams) -> None:
    streams.begin(2)
    await streams.reach(5)
    with capture_logs() as logs:
        await take_over(supervisor)
    assert [(log["event"], log["log_level"], log["request"], log["route"]) for log in logs] == [
        ("request taken over", "debug", "r0", "recompute"),
        ("request taken over", "debug", "r1", "recompute"),
    ]
    assert logs[0]["reason"] == "the fake engine does not hand its KV cache over"
    await streams.assert_exact()
