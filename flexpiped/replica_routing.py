"""Which of the replicas that serve a request boards: puts what is at each in the words of ``planner.routing``."""

from collections.abc import Mapping

from engines.protocol import Engine, GenerationRequest
from flexpiped.flight import Flights
from flexpiped.replica import Replica
from planner.routing import Job, Jobs, Option, choose_replica


def route(request: GenerationRequest, ready: Mapping[Engine, Replica], *, flights: Flights) -> Engine:
    """Return the engine at which a request is expected to be finished first; ``ready`` are those that serve."""
    tokens = (*request.prompt_token_ids, *request.generated_token_ids)
    left = request.sampling.max_tokens - len(request.generated_token_ids)
    job = Job(context_tokens=len(tokens), prefill_tokens=len(tokens), output_tokens=_expected(left, flights))
    chosen = choose_replica(job, [_option(engine, each, tokens, flights) for engine, each in ready.items()])
    return next(engine for engine, each in ready.items() if each.number == chosen.replica)


def _option(engine: Engine, replica: Replica, token_ids: tuple[int, ...], flights: Flights) -> Option:
    replica.facts.refresh(engine)
    return Option(
        replica=replica.number,
        load=Jobs(
            [
                Job(
                    context_tokens=flight.num_tokens,
                    prefill_tokens=flight.prefill_tokens,
                    output_tokens=_expected(flight.output_tokens, flights),
                )
                for flight in flights.at(engine)
            ]
        ),
        kv_capacity_tokens=replica.facts.kv_capacity_tokens,
        cached_tokens=replica.facts.cached_tokens(token_ids),
        pace=replica.facts.pace,
    )


def _expected(output_tokens: int, flights: Flights) -> float:
    return min(float(max(0, output_tokens)), flights.output_tokens_mean)
