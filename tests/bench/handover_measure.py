"""Measures handovers on any rig: legs with a move, windows without one, restarts beside; tables and bounds."""

import argparse
import asyncio
import time
from itertools import cycle, islice, pairwise
from typing import Any

from planner.layout import Pipeline
from tests.bench.handover_figures import figures_of, undisturbed
from tests.bench.handover_legs import Leg, run_leg
from tests.bench.handover_tables import bounds_of, print_moves, print_undisturbed
from tests.bench.program import whole_numbers
from tests.bench.rigs import Restartable, Rig
from tests.bench.stats import largest_gap, largest_gap_of, median
from tests.bench.tables import Bound, ms, say, table

_MARGIN = 1.2  # an undisturbed window is at least so much longer than the longest move,
_LONGEST_WINDOW_S = 10.0  # up to this


def add_options(parser: argparse.ArgumentParser, *, streams: tuple[int, ...]) -> None:
    """Add what every handover benchmark can be told."""
    parser.add_argument("--streams", type=whole_numbers, default=streams, help="numbers of streams")
    parser.add_argument("--moves", type=int, default=20, help="measured moves for each number of streams")
    parser.add_argument("--warm-moves", type=int, default=4, help="moves before those, not counted")
    parser.add_argument("--window-s", type=float, default=1.5, help="undisturbed window before and after each move")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="length of the prompts")
    parser.add_argument("--restarts", type=int, default=3, help="stop-and-restarts beside, for each number of streams")


def shorten(options: argparse.Namespace) -> None:
    """Few repetitions: they prove the program, and give no figures."""
    options.moves, options.warm_moves, options.window_s, options.restarts = 4, 0, 0.5, 1


async def legs_of(rig: Rig, streams: int, options: argparse.Namespace) -> list[Leg]:
    """Run the moves; those that warm up are left out."""
    layouts = list(islice(cycle(rig.laps), options.warm_moves + options.moves + 1))
    window_s = options.window_s
    legs: list[Leg] = []
    for number, (before, after) in enumerate(pairwise(layouts), start=1 - options.warm_moves):
        leg = await run_leg(
            rig,
            current=before,
            target=after,
            streams=streams,
            prompt_tokens=options.prompt_tokens,
            window_s=window_s,
        )
        legs.append(leg)
        window_s = min(max(window_s, _MARGIN * leg.move_s), _LONGEST_WINDOW_S)
        pause_s = leg.reports[-1].commit_pause_s or 0.0
        change = f"{before.granularity} -> {after.granularity}"
        say(
            f"{rig.name}, {streams} streams, move {number} of {options.moves}: {change} "
            f"took {ms(leg.move_s)} ms, pause {ms(pause_s)} ms"
        )
    if layouts[-1] != rig.laps[0]:
        await rig.move(rig.laps[0])
    return legs[options.warm_moves :]


async def measure(
    rig: Rig, options: argparse.Namespace, raw: dict[str, Any], *, is_direct: bool, commit_limit_ms: float = 10.0
) -> list[Bound]:
    """Measure on one rig at all numbers of streams, print the tables and return the bounds."""
    bounds: list[Bound] = []
    for streams in options.streams:
        where = f"{rig.name}, {streams} stream{'s' * (streams != 1)}"
        legs = await legs_of(rig, streams, options)
        moves = figures_of(legs)
        print_undisturbed(f"{where}: gaps between steps, undisturbed", list(undisturbed(legs, of_engine=True).values()))
        print_undisturbed(
            f"{where}: gaps between tokens, undisturbed", list(undisturbed(legs, of_engine=False).values())
        )
        print_moves(f"{where}: medians over moves (times in ms)", moves)
        raw[where] = {"moves": [move.to_wire() for move in moves]}
        bounds += bounds_of(where, moves, is_direct=is_direct, commit_limit_ms=commit_limit_ms)
        if isinstance(rig, Restartable):
            raw[where]["restarts"] = await _restarts(rig, where, streams, options)
    return bounds


async def _restarts(rig: Restartable, where: str, streams: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Do by stopping and starting what a refactoring does, and return how long no token came."""
    layouts = list(islice(cycle(rig.laps), options.restarts + 1))
    seen = []
    for before, after in pairwise(layouts):
        seen.append(
            await _restart(rig, after, streams, options)
            | {
                "before": before.granularity,
                "after": after.granularity,
            }
        )
        change = f"{before.granularity} -> {after.granularity}"
        say(f"{where}: restart {change} took {seen[-1]['no_token_s']:.2f} s without a token")
    if layouts[-1] != rig.laps[0]:
        await rig.move(rig.laps[0])
    if seen:
        head = ["stop and restart", "times", "no token at all ms", "largest client gap ms"]
        kinds = [median(s[key] for s in seen) for key in ("no_token_s", "client_gap_s")]
        table(where, head, [["all", str(len(seen)), *map(ms, kinds)]])
    return seen


async def _restart(rig: Restartable, target: Pipeline, streams: int, options: argparse.Namespace) -> dict[str, float]:
    await rig.begin(streams, options.prompt_tokens)
    await asyncio.sleep(options.window_s)
    began_s = time.monotonic()
    await rig.restart(target)
    ended_s = time.monotonic()
    times = await rig.times()
    await rig.end()
    together = sorted(time_s for stream in times for time_s in stream)
    return {
        "no_token_s": largest_gap(together, began_s, ended_s),
        "client_gap_s": largest_gap_of(times, began_s, ended_s),
    }
