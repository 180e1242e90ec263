"""Throughput: the same checkpoint in fp32 on the same two cores, served in every way there is, in turns.

One stage with two threads, over HTTP and directly; two stages of one thread each; vLLM on the CPU, eager and compiled,
over HTTP with the same client; transformers' generate. All take turns in every round, and medians are compared.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from tests.bench.contestants import (
    Contestant,
    Opening,
    flexpiped_direct,
    flexpiped_http,
    transformers_generate,
    vllm_http,
)
from tests.bench.http_client import HttpClient, http_client
from tests.bench.program import checkpoint, parser, run, setup_of, whole_numbers
from tests.bench.rounds import Rates, hold_rounds, plan_of
from tests.bench.tables import Bound, say, table, verdicts, write_json

ONE_HTTP, ONE_DIRECT = "flexpiped, 1 stage, HTTP", "flexpiped, 1 stage, direct"
TWO_HTTP, TWO_DIRECT = "flexpiped, 2 stages, HTTP", "flexpiped, 2 stages, direct"
EAGER, COMPILED = "vLLM eager, HTTP", "vLLM compiled, HTTP"
STATIC, DYNAMIC = "generate, static cache", "generate, dynamic cache"
_TWO_STAGES = {8: 0.8, 32: 0.9}  # at least, against one stage and against generate


def _options() -> argparse.Namespace:
    made = parser("Compare throughput.")
    made.add_argument("--vllm-python", metavar="PATH", type=Path, help="interpreter of vLLM's environment")
    made.add_argument("--only", metavar="WORDS", default="", help="only contestants with these words in their names")
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")
    made.add_argument("--turn-s", type=float, default=1.5, help="a turn repeats its batch until so much was measured")
    options = made.parse_args()
    if options.short:
        options.rounds, options.turn_s = 1, 0.0
    return options


def _openings(options: argparse.Namespace, model: Path, client: HttpClient) -> list[Opening]:
    """Return what opens the contestants, those left out left out."""
    setup, threads = setup_of(options), options.threads
    openings: dict[str, Opening] = {
        ONE_HTTP: flexpiped_http(ONE_HTTP, client, model, setup, stages=1),
        ONE_DIRECT: flexpiped_direct(ONE_DIRECT, model, setup, stages=1),
        TWO_HTTP: flexpiped_http(TWO_HTTP, client, model, setup, stages=2),
        TWO_DIRECT: flexpiped_direct(TWO_DIRECT, model, setup, stages=2),
        STATIC: transformers_generate({STATIC: "static", DYNAMIC: ""}, model, threads=threads),
    }
    if options.vllm_python is None:
        say("vLLM is left out: --vllm-python PATH names the interpreter of its environment")
    else:
        python = options.vllm_python.absolute()  # not resolved: a virtual environment is found by its link
        openings[EAGER] = vllm_http(EAGER, client, python, model, threads=threads, eager=True)
        openings[COMPILED] = vllm_http(COMPILED, client, python, model, threads=threads, eager=False)
    return [opening for name, opening in openings.items() if not options.only or options.only in name]


def _bounds(rates: Rates, names: list[str], streams: int) -> list[Bound]:
    """Return what is required at this number of streams."""

    def against(what: str, reference: str, limit: float | None, reference_rate: float | None = None) -> Bound:
        other = rates.median(reference, streams) if reference_rate is None else reference_rate
        return Bound(
            what=f"{streams} streams: {what} / {reference}", value=rates.median(what, streams) / other, limit=limit
        )

    generate = max(rates.median(STATIC, streams), rates.median(DYNAMIC, streams))
    bounds = [against(ONE_HTTP, name, 1.0) for name in (EAGER, COMPILED) if name in names]
    bounds += [
        against(ONE_DIRECT, "generate, the better", 0.9, generate),
        against(ONE_HTTP, "generate, the better", 0.75, generate),
    ]
    limit = _TWO_STAGES.get(streams)
    bounds += [
        against(TWO_DIRECT, ONE_DIRECT, limit),
        against(TWO_HTTP, ONE_HTTP, limit),
        against(TWO_DIRECT, "generate, the better", limit, generate),
    ]
    return bounds


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    plan = plan_of(options)
    contestants: list[Contestant] = []
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http_client())
        for opening in _openings(options, model, client):
            contestants += await stack.enter_async_context(opening())
            say(f"{contestants[-1].name} is up")
        rates = await hold_rounds(contestants, plan)
    names = [contestant.name for contestant in contestants]
    head = ["tokens/s, median of rounds", *(f"{streams} streams" for streams in plan.streams)]
    table("throughput", head, [[n, *(f"{rates.median(n, s):.0f}" for s in plan.streams)] for n in names])
    bounds = [bound for streams in plan.streams for bound in _bounds(rates, names, streams)]
    verdicts(bounds)
    write_json(options.json, {"tokens_per_s": rates.to_wire()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
