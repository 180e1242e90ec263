"""Engines whose start can be held up, streams that run, and second instances that take over."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from engines.closing import closing
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.fake_batch import hashed_tokens
from engines.protocol import EngineCapabilities, FinishReason, GenerationRequest, RefactorProgress, SamplingParams
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
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
