"""Handover: what streams feel while the layout changes, beside the same streams undisturbed and beside a restart.

Layouts 4 -> 2 -> 8 -> 1 -> 4 in laps, at 1, 8 and 32 streams. For every move: the largest gap between two steps of the
engine (its clock) against the undisturbed p99 of the slower of the two layouts, and the largest gap between two tokens
at the client against windows of the same length without a move. Both are measured in the same run, window by window.
"""

import argparse
import asyncio
from typing import Any

from tests.bench.direct import options_for
from tests.bench.handover_measure import add_options, measure, shorten
from tests.bench.program import checkpoint, parser, run, setup_of
from tests.bench.rigs import NATIVE_LAPS, direct_rig, http_rig
from tests.bench.tables import Bound, verdicts, write_json


def _options() -> argparse.Namespace:
    made = parser("Measure handovers while streams run.")
    made.add_argument("--http", action="store_true", help="also through HTTP: a daemon, moved by its admin API")
    made.add_argument("--only-http", action="store_true", help="only through HTTP")
    add_options(made, streams=(1, 8, 32))
    options = made.parse_args()
    if options.short:
        shorten(options)
    return options


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    first, setup = NATIVE_LAPS[0], setup_of(options)
    if not options.only_http:
        async with direct_rig(options_for(model, setup)) as rig:
            bounds += await measure(rig, options, raw, is_direct=True)
    if options.http or options.only_http:
        async with http_rig(model, first, setup) as served:
            bounds += await measure(served, options, raw, is_direct=False)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
