"""Handover inside real vLLM: layers move between its pipeline ranks while streams run.

As tests.bench.handover, at 1, 8 and 64 streams, over four ranks (2,2,2,2 -> 4,0,0,4 -> 3,0,3,2 decoders), beside
stopping and restarting vLLM with the new partition, and beside vLLM's own pause (held for nothing). Also the memory of
each rank before and after moves, and how soon tokens come again when the engine core is killed.
"""

import argparse
import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.bench.handover_measure import add_options, measure, shorten
from tests.bench.program import checkpoint, parser, run, setup_of
from tests.bench.served_rig import measure_memory
from tests.bench.stats import largest_gap_of, median
from tests.bench.tables import Bound, ms, table, verdicts, write_json
from tests.bench.vllm_rig import VllmRig, vllm_rig

_COMMIT_LIMIT_MS = 15.0
_PAUSES = 5


def _options() -> argparse.Namespace:
    made = parser("Measure moves inside vLLM while streams run.")
    made.add_argument("--vllm-python", type=Path, required=True, help="interpreter of an environment that has vLLM")
    add_options(made, streams=(1, 8, 64))
    made.set_defaults(restarts=1, window_s=2.0)
    options = made.parse_args()
    if options.short:
        shorten(options)
    return options


async def _pauses(rig: VllmRig, options: argparse.Namespace) -> None:
    """vLLM's own pause and resume at once: what a change would cost that needs generation to stand still."""
    rows = []
    for streams in options.streams:
        await rig.begin(streams, options.prompt_tokens)
        gaps = []
        for _ in range(_PAUSES):
            await rig.times()
            await asyncio.sleep(options.window_s / 2)
            began_s = time.monotonic()
            await rig.pause(0.0)
            ended_s = time.monotonic()
            await asyncio.sleep(options.window_s / 2)
            gaps.append(largest_gap_of(await rig.times(), began_s, ended_s))
        await rig.end()
        rows.append([str(streams), str(len(gaps)), ms(median(gaps))])
    table("vLLM's own pause?mode=keep and resume, nothing done between", ["streams", "times", "client gap ms"], rows)


async def _kill(rig: VllmRig, raw: dict[str, Any]) -> None:
    """Kill the engine core under streams; they go on in a new vLLM from their tokens."""
    await rig.begin(8, 64)
    killed_s = time.monotonic()
    os.kill(rig.engine.pids["core"], signal.SIGKILL)
    reason = await rig.engine.died()
    noticed_s = time.monotonic() - killed_s
    await rig.restart(rig.laps[0])
    back_s = time.monotonic() - killed_s
    await rig.end()
    table("kill -9 of the engine core, 8 streams", ["noticed after s", "next token after s", "reason"],
          [[f"{noticed_s:.3f}", f"{back_s:.1f}", reason]])  # fmt: skip
    raw["kill"] = {"noticed_s": noticed_s, "next_token_s": back_s}


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    async with vllm_rig(model, setup_of(options), python=options.vllm_python) as rig:
        await measure_memory(rig, raw, restart=options.restarts > 0)
        await _pauses(rig, options)
        bounds += await measure(rig, options, raw, is_direct=True, commit_limit_ms=_COMMIT_LIMIT_MS)
        await _kill(rig, raw)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
