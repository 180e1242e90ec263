"""Handover: what streams feel while the layout changes, beside the same streams undisturbed and beside a restart.

Layouts 4 -> 2 -> 8 -> 1 -> 4 in laps, at 1, 8 and 32 streams. For every move: the largest gap between two steps of the
engine (its clock) against the undisturbed p99 of the slower of the two layouts, and the largest gap between two tokens
at the client against windows of the same length without a move. Both are measured in the same run, window by window.
"""

import argparse
import asyncio
import time
from itertools import cycle, islice, pairwise
from typing import Any

from planner.layout import Pipeline
from tests.bench.handover_figures import figures_of, undisturbed
from tests.bench.handover_legs import Leg, run_leg
from tests.bench.handover_tables import bounds_of, print_moves, print_undisturbed
from tests.bench.program import checkpoint, even, parser, run, setup_of, whole_numbers
from tests.bench.rigs import DirectRig, Rig, direct_rig, http_rig
from tests.bench.stats import largest_gap, largest_gap_of, median
from tests.bench.tables import Bound, ms, say, table, verdicts, write_json

LAPS = (4, 2, 8, 1)  # and 4 again
_MARGIN = 1.2  # an undisturbed window is at least so much longer than the longest move,
_LONGEST_WINDOW_S = 10.0  # up to this


def _options() -> argparse.Namespace:
    made = parser("Measure handovers while streams run.")
    made.add_argument("--http", action="store_true", help="also through HTTP: a daemon, moved by its admin API")
    made.add_argument("--only-http", action="store_true", help="only through HTTP")
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--moves", type=int, default=20, help="measured moves for each number of streams")
    made.add_argument("--warm-moves", type=int, default=4, help="moves before those, not counted")
    made.add_argument("--window-s", type=float, default=1.5, help="undisturbed window before and after each move")
    made.add_argument("--prompt-tokens", type=int, default=64, help="length of the prompts")
    made.add_argument("--restarts", type=int, default=3, help="stop-and-restarts beside, for each number of streams")
    options = made.parse_args()
    if options.short:
        options.moves, options.warm_moves, options.window_s, options.restarts = 4, 0, 0.5, 1
    return options


async def _legs(rig: Rig, streams: int, options: argparse.Namespace) -> list[Leg]:
    """Run the moves; those that warm up are left out."""
    stages = list(islice(cycle(LAPS), options.warm_moves + options.moves + 1))
    window_s = options.window_s
    legs: list[Leg] = []
    for number, (before, after) in enumerate(pairwise(stages), start=1 - options.warm_moves):
        leg = await run_leg(
            rig,
            current=even(before),
            target=even(after),
            streams=streams,
            prompt_tokens=options.prompt_tokens,
            window_s=window_s,
        )
        legs.append(leg)
        window_s = min(max(window_s, _MARGIN * leg.move_s), _LONGEST_WINDOW_S)
        pause_s = leg.reports[-1].commit_pause_s or 0.0
        say(
            f"{rig.name}, {streams} streams, move {number} of {options.moves}: {before} -> {after} "
            f"took {ms(leg.move_s)} ms, pause {ms(pause_s)} ms"
        )
    if stages[-1] != LAPS[0]:
        await rig.move(even(LAPS[0]))
    return legs[options.warm_moves :]


async def _measure(rig: Rig, options: argparse.Namespace, raw: dict[str, Any]) -> list[Bound]:
    """Measure on one rig at all numbers of streams, print the tables and return the bounds."""
    bounds: list[Bound] = []
    is_direct = isinstance(rig, DirectRig)
    for streams in options.streams:
        where = f"{rig.name}, {streams} stream{'s' * (streams != 1)}"
        legs = await _legs(rig, streams, options)
        moves = figures_of(legs)
        print_undisturbed(f"{where}: gaps between steps, undisturbed", list(undisturbed(legs, of_engine=True).values()))
        print_undisturbed(
            f"{where}: gaps between tokens, undisturbed", list(undisturbed(legs, of_engine=False).values())
        )
        print_moves(f"{where}: medians over moves (times in ms)", moves)
        raw[where] = {"moves": [move.to_wire() for move in moves]}
        bounds += bounds_of(where, moves, is_direct=is_direct)
        if isinstance(rig, DirectRig):
            raw[where]["restarts"] = await _restarts(rig, where, streams, options)
    return bounds


async def _restarts(rig: DirectRig, where: str, streams: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Do by stopping and starting what a refactoring does, and return how long no token came."""
    layouts = list(islice(cycle(LAPS), options.restarts + 1))
    seen = []
    for before, after in pairwise(layouts):
        seen.append(await _restart(rig, even(after), streams, options) | {"before": before, "after": after})
        say(f"{where}: restart {before} -> {after} took {seen[-1]['no_token_s']:.2f} s without a token")
    if layouts[-1] != LAPS[0]:
        await rig.move(even(LAPS[0]))
    if seen:
        head = ["stop and restart", "times", "no token at all ms", "largest client gap ms"]
        kinds = [median(s[key] for s in seen) for key in ("no_token_s", "client_gap_s")]
        table(where, head, [["all", str(len(seen)), *map(ms, kinds)]])
    return seen


async def _restart(rig: DirectRig, target: Pipeline, streams: int, options: argparse.Namespace) -> dict[str, float]:
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


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    first, setup = even(LAPS[0]), setup_of(options)
    if not options.only_http:
        async with direct_rig(model, first, setup) as rig:
            bounds += await _measure(rig, options, raw)
    if options.http or options.only_http:
        async with http_rig(model, first, setup) as served:
            bounds += await _measure(served, options, raw)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
