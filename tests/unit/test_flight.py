"""A request is taken off its engine at any moment, and its reader's own cancellation is told apart."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from engines.errors import EngineDied, EngineError
from engines.fake import FakeEngine
from engines.protocol import GenerationRequest, SamplingParams, TokenChunk
from flexpiped.flight import Flight, Flights, TakenOff
from tests.support.layouts import even_pipeline
from tests.support.until import until

REQUEST = GenerationRequest(
    request_id="r", prompt_token_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=40, ignore_eos=True)
)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(pipeline=even_pipeline(1))
    await engine.start(on_progress=lambda _: None)
    yield engine
    await engine.close()


@pytest.fixture
def flight(engine: FakeEngine) -> Flight:
    flight = Flight("r")
    flight.board(engine, REQUEST)
    return flight


async def assert_forgotten(engine: FakeEngine, flight: Flight) -> None:
    counters = await engine.counters()
    assert (counters.running, counters.waiting, flight.engine) == (0, 0, None)


async def is_waiting(engine: FakeEngine) -> bool:
    return (await engine.counters()).waiting == 1


async def waiting_reader(engine: FakeEngine, flight: Flight) -> "asyncio.Task[TokenChunk]":
    """Return a reader that waits for an engine which gives nothing, and leaves as ``Supervisor.generate`` does."""

    async def read() -> TokenChunk:
        try:
            return await flight.next_chunk()
        finally:
            await flight.leave()

    engine.hold()
    reading = asyncio.create_task(read())
    await until(lambda: is_waiting(engine))
    return reading


async def test_a_reader_that_waits_is_interrupted(engine: FakeEngine, flight: Flight) -> None:
    reading = await waiting_reader(engine, flight)
    assert await flight.take_off()
    with pytest.raises(TakenOff):
        await reading
    assert reading.cancelling() == 0
    await assert_forgotten(engine, flight)


async def test_taken_off_twice_is_taken_off_once(engine: FakeEngine, flight: Flight) -> None:
    reading = await waiting_reader(engine, flight)
    assert await asyncio.gather(flight.take_off(), flight.take_off()) == [True, True]
    with pytest.raises(TakenOff):
        await reading
    assert reading.cancelling() == 0
    assert not await flight.take_off()


@pytest.mark.parametrize("first", ["the client", "the handover"])
async def test_a_client_that_leaves_in_the_same_turn_has_left(engine: FakeEngine, flight: Flight, first: str) -> None:
    reading = await waiting_reader(engine, flight)
    if first == "the client":
        reading.cancel()
    taking = asyncio.create_task(flight.take_off())
    if first == "the handover":
        asyncio.get_running_loop().call_soon(reading.cancel)
    await taking
    with pytest.raises(asyncio.CancelledError):
        await reading
    await assert_forgotten(engine, flight)


async def test_a_reader_that_is_elsewhere_learns_it_when_it_comes_back(engine: FakeEngine, flight: Flight) -> None:
    await flight.next_chunk()
    assert not await flight.take_off()
    await assert_forgotten(engine, flight)
    with pytest.raises(TakenOff):
        await flight.next_chunk()
    await flight.leave()


async def test_it_boards_another_engine(engine: FakeEngine, flight: Flight) -> None:
    other = FakeEngine(pipeline=even_pipeline(2))
    await other.start(on_progress=lambda _: None)
    tokens = list((await flight.next_chunk()).token_ids)
    await flight.take_off()
    flight.board(other, replace(REQUEST, generated_token_ids=tuple(tokens)))
    while len(tokens) < 40:
        tokens += (await flight.next_chunk()).token_ids
    assert tokens == [t async for chunk in engine.generate(REQUEST) for t in chunk.token_ids]
    assert flight.num_tokens == 43
    await other.close()


async def test_who_waits_for_it_to_go_on_is_told(engine: FakeEngine, flight: Flight) -> None:
    reading = await waiting_reader(engine, flight)
    await flight.take_off()
    going_on = asyncio.create_task(flight.goes_on())
    await asyncio.gather(reading, return_exceptions=True)
    engine.release()
    flight.board(engine, REQUEST)
    await flight.next_chunk()
    await going_on
    await flight.leave()


async def test_an_end_is_news_too(engine: FakeEngine) -> None:
    flights = Flights()
    with flights.begin("r") as flight:
        flight.board(engine, REQUEST)
        assert flights.at(engine) == (flight,)
        reading = await waiting_reader(engine, flight)
        await flight.take_off()
        await asyncio.gather(reading, return_exceptions=True)
    await flight.goes_on()
    assert (len(flights), flight.has_ended) == (0, True)


async def test_an_engine_that_gives_its_chunk_all_the_same() -> None:
    """It swallows the interruption: the chunk is not lost, and the engine forgets the request."""

    class Stubborn(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:  # noqa: ARG002
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                yield TokenChunk(token_ids=(1,))

    stubborn, flight = Stubborn(pipeline=even_pipeline(1)), Flight("r")
    flight.board(stubborn, REQUEST)
    reading = asyncio.create_task(flight.next_chunk())
    await asyncio.sleep(0)
    assert await flight.take_off()
    assert (await reading).token_ids == (1,)
    assert (reading.cancelling(), flight.engine) == (0, None)


async def test_the_engines_errors_come_through(engine: FakeEngine, flight: Flight) -> None:
    reading = await waiting_reader(engine, flight)
    engine.kill("gone")
    with pytest.raises(EngineDied, match="gone"):
        await reading


async def test_an_engine_that_ends_without_a_reason_is_an_error() -> None:
    class Silent(FakeEngine):
        async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:  # noqa: ARG002
            return
            yield

    flight = Flight("r")
    flight.board(Silent(pipeline=even_pipeline(1)), REQUEST)
    with pytest.raises(EngineError, match="without a reason"):
        await flight.next_chunk()
    await flight.leave()
