"""One request to its end, over deaths of engines and changes from one to another: it goes on after its last token."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from engines.errors import EngineDied
from engines.protocol import Engine, GenerationRequest, TokenChunk
from flexpiped.flight import Flight, Flights, TakenOff
from flexpiped.supervision import FRUITLESS_DEATHS, finish_of


class FindEngine(Protocol):
    """Finds the engine that a request boards next, waiting for one where need be."""

    async def __call__(self, request: GenerationRequest, flight: Flight, /, *, other_than: Engine | None) -> Engine:
        """Return an engine that serves. Raises ``EngineDied``, ``EngineClosed``: there will be none.

        Args:
            request: With what has been generated so far.
            other_than: The engine that it comes from.
        """


async def continued(request: GenerationRequest, *, flights: Flights, find: FindEngine) -> AsyncIterator[TokenChunk]:
    """Continue the prompt as ``Engine.generate`` does, over deaths of engines. Close it to abort.

    Raises:
        InvalidRequest: Before the first chunk.
        EngineDied: There is no engine for good, or they keep dying over this request.
        EngineClosed: The daemon or the model is being stopped.
    """
    generated = list(request.generated_token_ids)
    engine: Engine | None = None
    fruitless_deaths = 0
    with flights.begin(request.request_id) as flight:
        flight.sampling = request.sampling
        while fruitless_deaths < FRUITLESS_DEATHS:
            onward = replace(request, generated_token_ids=tuple(generated))
            engine = await find(onward, flight, other_than=engine)
            finish = finish_of(request, generated, engine.capabilities)
            if finish is not None:
                yield TokenChunk(token_ids=(), finish_reason=finish)
                return
            flight.board(engine, onward)
            try:
                while True:
                    chunk = await flight.next_chunk()
                    generated.extend(chunk.token_ids)
                    fruitless_deaths = 0
                    yield chunk
                    if chunk.finish_reason is not None:
                        return
            except EngineDied:
                fruitless_deaths += 1
            except TakenOff:
                pass
            finally:
                await flight.leave()
    raise EngineDied(f"the engine died {fruitless_deaths} times in a row over this request")
