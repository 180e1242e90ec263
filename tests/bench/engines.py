"""One table of the engines: native, vLLM and SGLang behind flexpiped, on the same checkpoint, in fp32, over HTTP.

Each has two stages of one thread. Tokens per second in turns, the time a daemon takes from its start until it serves,
the memory of all processes under it, and what clients see of a move of two decoders to the other stage and back.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

from planner.layout import pipeline_of
from tests.bench.contestants import OverHttp
from tests.bench.daemon_process import DaemonProcess, daemon
from tests.bench.handover_figures import MoveFigures, figures_of
from tests.bench.handover_legs import run_leg
from tests.bench.http_client import HttpClient, http_client
from tests.bench.program import (
    DEVICES,
    NUM_DECODERS,
    add_engine_pythons,
    checkpoint,
    parser,
    run,
    setup_of,
    whole_numbers,
)
from tests.bench.rigs import HttpRig
from tests.bench.rounds import Rates, hold_rounds, plan_of
from tests.bench.stats import median
from tests.bench.tables import mib, ms, say, table, times, write_json

_LAPS = tuple(pipeline_of(device_ids=DEVICES[:2], cuts=[cut], num_decoders=NUM_DECODERS) for cut in (4, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A daemon that is up."""

    name: str
    server: DaemonProcess
    boot_s: float


def _options() -> argparse.Namespace:
    made = parser("Compare the engines behind flexpiped.")
    add_engine_pythons(made)
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")
    made.add_argument("--turn-s", type=float, default=1.5, help="a turn repeats its batch until so much was measured")
    made.add_argument("--moves", type=int, default=10, help="moves of each engine")
    made.add_argument("--move-streams", type=int, default=8, help="streams that run during moves")
    made.add_argument("--window-s", type=float, default=1.5, help="undisturbed window before and after each move")
    options = made.parse_args()
    if options.short:
        options.rounds, options.moves, options.turn_s, options.window_s = 1, 2, 0.0, 0.5
    return options


async def _boot(stack: AsyncExitStack, model: Path, options: argparse.Namespace) -> list[Served]:
    """Start one daemon after the other, so that none measures the start of another."""
    wanted = {"native": None, "vllm": options.vllm_python, "sglang": options.sglang_python}
    booted = []
    for engine, python in wanted.items():
        if engine != "native" and python is None:
            say(f"{engine} is left out: --{engine}-python PATH names the interpreter of its environment")
            continue
        interpreter = None if python is None else python.absolute()  # not resolved: found by its link
        began_s = time.monotonic()
        opening = daemon(model, setup_of(options), stages=2, engine=engine, python=interpreter)
        server = await stack.enter_async_context(opening)
        booted.append(Served(name=engine, server=server, boot_s=time.monotonic() - began_s))
        say(f"{engine} is up")
    return booted


async def _move(served: Served, client: HttpClient, options: argparse.Namespace) -> list[MoveFigures]:
    """Move to and fro; the first move is not counted."""
    rig, legs = HttpRig(served.server, client), []
    for before, after in pairwise(islice(cycle(_LAPS), options.moves + 2)):
        leg = await run_leg(
            rig,
            current=before,
            target=after,
            streams=options.move_streams,
            prompt_tokens=options.prompt_tokens,
            window_s=options.window_s,
        )
        legs.append(leg)
        say(f"{served.name}: move {len(legs) - 1} of {options.moves} took {ms(leg.move_s)} ms")
    return figures_of(legs[1:])


def _print(
    booted: Sequence[Served],
    rates: Rates,
    memory: dict[str, int],
    moves: dict[str, list[MoveFigures]],
    options: argparse.Namespace,
) -> None:
    rows = []
    for served in booted:
        seen = moves[served.name]
        pauses = [figures.leg.reports[-1].commit_pause_s or 0.0 for figures in seen]
        rows.append(
            [
                served.name,
                *(f"{rates.median(served.name, streams):.0f}" for streams in options.streams),
                *(f"{served.boot_s:.0f}", mib(memory[served.name])),
                *(ms(median(pauses)), ms(median(each.client_gap_s for each in seen))),
                times(median(each.client_ratio for each in seen)),
            ]
        )
    head = ["engine", *(f"tok/s, {streams}" for streams in options.streams), "boot s", "PSS MiB"]
    table("engines, two stages of one thread", [*head, "commit ms", "gap in a move ms", "of one without"], rows)


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    plan = plan_of(options)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http_client())
        booted = await _boot(stack, model, options)
        rates = await hold_rounds([OverHttp(each.name, client, each.server.url) for each in booted], plan)
        memory = {each.name: each.server.memory_bytes() for each in booted}
        moves = {each.name: await _move(each, client, options) for each in booted}
    _print(booted, rates, memory, moves, options)
    raw = {
        "tokens_per_s": rates.to_wire(),
        "boot_s": {each.name: each.boot_s for each in booted},
        "memory_bytes": memory,
        "moves": {name: [figures.to_wire() for figures in seen] for name, seen in moves.items()},
    }
    write_json(options.json, raw, [])
    return 0


if __name__ == "__main__":
    run(main)
