"""Another kind of engine takes the place of the one in force: request by request, and for good."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from engines.closing import closing
from engines.errors import EngineClosed, EngineDied, UnsupportedByEngine
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.fake_batch import hashed_tokens
from engines.protocol import (
    Engine,
    EngineCapabilities,
    GenerationRequest,
    Grammar,
    GrammarKind,
    SamplingParams,
)
from engines.vllm.sampling import ENGINE_PARAMS as VLLM_PARAMS
from flexpiped.events import EventLog
from flexpiped.handover_records import HandoverRecord, HandoverResult, Proposal, TargetResolver, Wanted, Way
from flexpiped.proposals import ReplicaHandover
from flexpiped.refactoring import Refactorings, Started
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import EngineFactory, Supervisor
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits
from tests.support.layouts import EvenResolver, even_pipeline
from tests.support.until import until

STREAMS = 6
TOKENS = 300
RICH = replace(FAKE_CAPABILITIES, name="vllm", engine_params=VLLM_PARAMS, top_logprobs=True, grammars=True)
GRAMMAR = Grammar(kind=GrammarKind.REGEX, source="a+", parameter="structured_outputs")
PLAIN = replace(FAKE_CAPABILITIES, name="native", eos_token_ids=tuple(reversed(FAKE_CAPABILITIES.eos_token_ids)))
KINDS = {"vllm": RICH, "native": PLAIN}


def request(index: int, **engine_params: object) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, engine_params=engine_params)
    return GenerationRequest(request_id=f"r{index}", prompt_token_ids=(5 + index, 7, 9), sampling=sampling)


def undisturbed(index: int) -> list[int]:
    next_token = hashed_tokens(FAKE_CAPABILITIES.vocab_size)
    return [next_token(request(index), position) for position in range(TOKENS)]


@dataclass(frozen=True, slots=True)
class Other:
    resolver: TargetResolver
    replica: Callable[[Pipeline], ReplicaHandover]


@dataclass
class Stand:
    """A supervised engine of one kind, and refactorings that know the other."""

    engines: list[FakeEngine] = field(default_factory=list)
    drain_deadline_s: float = 5.0

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(factory=self.making(RICH), pipeline=even_pipeline(2), sleep=_at_once)
        self.refactorings = Refactorings(
            engine=self.engine,
            resolver=EvenResolver,
            events=EventLog(),
            replica=lambda target, _on: ReplicaRunner(self.supervisor, target),
            other_engine=self.other,
        )

    def making(self, capabilities: EngineCapabilities) -> EngineFactory:
        def make(pipeline: Pipeline, epoch: int) -> FakeEngine:
            self.engines.append(FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=capabilities))
            return self.engines[-1]

        return make

    def engine(self) -> Engine:
        if self.supervisor.engine is None:
            raise EngineDied("there is none")
        return self.supervisor.engine

    def other(self, name: str) -> Other:
        if name not in KINDS:
            raise UnsupportedByEngine(f"there is no engine {name!r}")
        factory, limits = self.making(KINDS[name]), ReplicaLimits(drain_deadline_s=self.drain_deadline_s)
        return Other(
            EvenResolver(), lambda target: ReplicaRunner(self.supervisor, target, factory=factory, limits=limits)
        )

    async def read(self, wanted: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        async with closing(self.supervisor.generate(wanted)) as chunks:
            async for chunk in chunks:
                tokens.extend(chunk.token_ids)
        return tokens

    async def begin(self, *wanted: GenerationRequest) -> "list[asyncio.Task[list[int]]]":
        tasks = [asyncio.create_task(self.read(one)) for one in wanted]
        await until(lambda: len(self.supervisor.flights.at(self.engine())) == len(wanted))
        return tasks

    async def change(self, wanted: Wanted, *, let_go: bool = True) -> HandoverRecord:
        """Change the engine. Requests wait while that is planned in a thread: a fake engine is faster than one."""
        first = self.engines[-1]
        first.hold()
        assert isinstance(await self.refactorings.start(wanted), Started)
        if let_go:
            first.release()
        await until(lambda: self.refactorings.under_way is None)
        return self.refactorings.history[-1]

    @property
    def name(self) -> str:
        return self.engine().capabilities.name


async def _at_once(_duration_s: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    stand = Stand()
    await stand.supervisor.start()
    yield stand
    await stand.supervisor.close()


async def test_there_and_back_again_with_streams(stand: Stand) -> None:
    streams = await stand.begin(*(request(index) for index in range(STREAMS)))
    there = await stand.change(Wanted(engine="native"))
    assert (there.result, there.way, stand.name) == (HandoverResult.DONE, Way.REPLICA, "native")
    assert (there.engine_before, there.engine_after, there.stages_after) == ("vllm", "native", 2)
    assert stand.supervisor.capabilities is PLAIN
    back = await stand.change(Wanted(engine="vllm", stages=4))
    assert (back.stages_after, stand.name, stand.engine().epoch) == (4, "vllm", 2)
    assert await asyncio.gather(*streams) == [undisturbed(index) for index in range(STREAMS)]


async def test_after_a_death_the_engine_in_force_is_started_again(stand: Stand) -> None:
    await stand.change(Wanted(engine="native"))
    (stream,) = await stand.begin(request(0))
    stand.engines[-1].kill("killed")
    assert await stream == undisturbed(0)
    assert (stand.name, len(stand.engines)) == ("native", 3)


async def test_a_change_that_fails_leaves_the_kind_as_it_was(stand: Stand) -> None:
    KINDS["short"] = replace(PLAIN, name="short", max_model_len=64)
    try:
        record = await stand.change(Wanted(engine="short"))
    finally:
        del KINDS["short"]
    assert record.result is HandoverResult.ABORTED
    assert "has a context of 64 tokens, the first 512" in record.message
    stand.engines[0].kill("killed")
    assert (await stand.supervisor.ready_engine(other_than=stand.engines[0])).capabilities.name == "vllm"


async def test_what_it_would_mean_is_said_beforehand(stand: Stand) -> None:
    proposal = await stand.refactorings.propose(Wanted(engine="native"))
    assert proposal.changes_something
    assert proposal.check.feasible
    assert proposal.stages_text == "vllm -> native, 2 -> 2 stages by replica"
    assert proposal.check.moves == ("by a second instance on cpu:0, cpu:1, as native takes the place of vllm",)


async def test_the_engine_in_force_is_nothing_to_change(stand: Stand) -> None:
    assert not (await stand.refactorings.propose(Wanted(engine="vllm"))).changes_something
    proposal = await stand.refactorings.propose(Wanted(engine="vllm", stages=4))
    assert (proposal.way, proposal.engine_after) == (Way.IN_PLACE, "")
    assert isinstance(await stand.refactorings.start(Wanted(engine="vllm")), Proposal)


async def test_an_engine_that_is_not_there_is_refused(stand: Stand) -> None:
    with pytest.raises(UnsupportedByEngine, match="there is no engine 'sglang'"):
        await stand.refactorings.start(Wanted(engine="sglang"))
    alone = Refactorings(engine=stand.engine, resolver=EvenResolver, events=EventLog())
    with pytest.raises(UnsupportedByEngine, match="no engine 'native' can take the place"):
        await alone.start(Wanted(engine="native"))


async def test_a_request_that_the_other_engine_does_not_know_ends_at_the_first(stand: Stand) -> None:
    streams = await stand.begin(request(0), request(1, min_p=0.1), request(2))
    record = await stand.change(Wanted(engine="native"))
    assert record.message == (
        "the second instance serves, 2 of 2 requests taken over: 2 computed again, 1 more finished at the first"
    )
    assert await asyncio.gather(*streams) == [undisturbed(index) for index in range(3)]
    assert (await stand.engines[1].counters()).generated_tokens_total < 2 * TOKENS


@pytest.mark.parametrize("sampling", [{"top_logprobs": 2}, {"prompt_logprobs": 0}, {"grammar": GRAMMAR}], ids=str)
async def test_neither_does_one_that_asks_for_what_the_other_cannot_tell_or_do(
    stand: Stand, sampling: dict[str, Any]
) -> None:
    asked = request(1)
    (stream,) = await stand.begin(replace(asked, sampling=replace(asked.sampling, **sampling)))
    record = await stand.change(Wanted(engine="native"))
    assert record.message.endswith("1 more finished at the first")
    assert await stream == undisturbed(1)


async def test_it_is_not_waited_for_without_end(stand: Stand) -> None:
    stand.drain_deadline_s = 0.01
    (stream,) = await stand.begin(request(1, min_p=0.1))
    record = await stand.change(Wanted(engine="native"), let_go=False)
    assert record.result is HandoverResult.DONE
    assert record.message.endswith("the first instance did not drain within 0.01 s and was ended")
    with pytest.raises(EngineClosed, match="the engine was closed"):
        await stream


async def test_kinds_that_share_a_parameter_take_it_along(stand: Stand) -> None:
    KINDS["twin"] = replace(RICH, name="twin")
    try:
        (stream,) = await stand.begin(request(1, min_p=0.1))
        record = await stand.change(Wanted(engine="twin"))
    finally:
        del KINDS["twin"]
    assert record.message.endswith("1 of 1 request taken over: 1 computed again")
    assert await stream == undisturbed(1)
