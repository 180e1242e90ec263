"""Micro-batches in flight: tokens/s for stages 2, 4, 8 with at most 1, 2, 4, 8 of them, at 8 and 32 streams.

This is what the engine's default (as many as stages, at most as many as cores) rests on. One engine for each limit; all
take turns at each number of stages, to which they are refactored.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

from engines.native.adapter import NativeEngine
from engines.native.options import NativeOptions, micro_batches_for
from engines.process import usable_cores
from tests.bench import direct
from tests.bench.contestants import Direct
from tests.bench.program import checkpoint, even, parser, run, setup_of, whole_numbers
from tests.bench.rounds import Rates, RoundsPlan, hold_rounds, plan_of
from tests.bench.tables import Bound, say, table, verdicts, write_json


def _options() -> argparse.Namespace:
    made = parser("Measure how many micro-batches in flight are best.")
    made.add_argument("--stages", type=whole_numbers, default=(2, 4, 8), help="numbers of stages")
    made.add_argument("--limits", type=whole_numbers, default=(1, 2, 4, 8), help="micro-batches in flight")
    made.add_argument("--streams", type=whole_numbers, default=(8, 32), help="numbers of streams")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")
    made.add_argument("--turn-s", type=float, default=1.5, help="a turn repeats its batch until so much was measured")
    options = made.parse_args()
    if options.short:
        options.rounds, options.turn_s, options.tokens = 1, 0.0, 32
    return options


async def _at(stages: int, engines: dict[int, NativeEngine], plan: RoundsPlan) -> Rates:
    """Bring the engines to that many stages and let them take turns. A limit above the stages would change nothing."""
    taking_part = {limit: engine for limit, engine in engines.items() if limit <= stages}
    for engine in taking_part.values():
        if engine.pipeline != even(stages):
            await direct.move(engine, even(stages))
    say(f"{stages} stages, {len(taking_part)} engines")
    return await hold_rounds([Direct(_name(limit), engine) for limit, engine in taking_part.items()], plan)


def _name(limit: int) -> str:
    return f"{limit} in flight"


def _bound(options: NativeOptions, rates: Rates, *, stages: int, streams: int, limits: list[int]) -> Bound:
    """Return how the default does against the best. No bound is required; the default is meant to be near 1."""
    default = micro_batches_for(options, num_stages=stages, cores=options.threads or usable_cores())
    best = max(rates.median(_name(limit), streams) for limit in limits)
    return Bound(
        what=f"{stages} stages, {streams} streams: default ({default}) / best",
        value=rates.median(_name(default), streams) / best,
        limit=None,
    )


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    setup = setup_of(options)
    plan = plan_of(options)
    found: dict[int, Rates] = {}
    async with AsyncExitStack() as stack:
        engines: dict[int, NativeEngine] = {}
        for limit in options.limits:
            limited = direct.options_for(model, replace(setup, max_micro_batches=limit))
            engines[limit] = await stack.enter_async_context(direct.running(limited, even(options.stages[0])))
            say(f"the engine with {_name(limit)} is up")
        for stages in options.stages:
            found[stages] = await _at(stages, engines, plan)
    rows, bounds = [], []
    for stages, rates in found.items():
        for streams in options.streams:
            cells = [f"{rates.median(_name(limit), streams):.0f}" for limit in options.limits if limit <= stages]
            blank = [""] * (len(options.limits) - len(cells))
            rows.append([f"{stages} stages, {streams} streams", *cells, *blank])
            limits = [limit for limit in options.limits if limit <= stages]
            bounds.append(
                _bound(direct.options_for(model, setup), rates, stages=stages, streams=streams, limits=limits)
            )
    table("tokens/s, median of rounds", ["", *map(_name, options.limits)], rows)
    verdicts(bounds)
    write_json(options.json, {f"{stages} stages": rates.to_wire() for stages, rates in found.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
