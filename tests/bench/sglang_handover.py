"""Handover inside real SGLang: layers move between its pipeline ranks while streams run.

As tests.bench.vllm_handover, over four ranks (2,2,2,2 -> 4,0,0,4 -> 3,0,3,2 decoders), beside stopping and restarting
SGLang with the new partition. Also the memory of each rank before and after moves under streams, and after a restart.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from tests.bench.handover_measure import add_options, measure, shorten
from tests.bench.program import checkpoint, parser, run, setup_of
from tests.bench.served_rig import measure_memory
from tests.bench.sglang_rig import sglang_rig
from tests.bench.tables import Bound, verdicts, write_json

_COMMIT_LIMIT_MS = 20.0


def _options() -> argparse.Namespace:
    made = parser("Measure moves inside SGLang while streams run.")
    made.add_argument("--sglang-python", type=Path, required=True, help="interpreter of an environment that has SGLang")
    add_options(made, streams=(1, 8))
    made.set_defaults(restarts=1, window_s=2.0)
    options = made.parse_args()
    if options.short:
        shorten(options)
    return options


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    python = options.sglang_python.absolute()  # not resolved: a virtual environment is found by its link
    async with sglang_rig(model, setup_of(options), python=python) as rig:
        await measure_memory(rig, raw, restart=options.restarts > 0)
        bounds += await measure(rig, options, raw, is_direct=True, commit_limit_ms=_COMMIT_LIMIT_MS)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
