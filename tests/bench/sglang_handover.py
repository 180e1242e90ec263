"""Handover inside real SGLang: layers move between its pipeline ranks while streams run.

As tests.bench.vllm_handover, over four ranks (2,2,2,2 -> 4,0,0,4 -> 3,0,3,2 decoders). SGLang is driven by the sockets
of the plugin alone, so the figures are of the moves and of nothing around them. The checksums of the tests are not
taken. Also the memory of each rank in each layout.
"""

import argparse
import asyncio
import os
from pathlib import Path
from typing import Any

from engines.process import memory_pss_bytes
from engines.protocol import RefactorProgress
from planner.layout import Pipeline
from tests.bench import direct
from tests.bench.handover_measure import add_options, measure, shorten
from tests.bench.program import checkpoint, parser, prompts, run
from tests.bench.rigs import WARM, longest_output
from tests.bench.tables import Bound, mib, table, verdicts, write_json
from tests.support.sglang_plugin import PluginDriver, driven

_COMMIT_LIMIT_MS = 20.0
_START = (2, 2, 2, 2)
_KV_TOKENS = 64 << 10


class SglangRig:
    """One SGLang of four pipeline ranks."""

    name = "SGLang"

    def __init__(self, driver: PluginDriver) -> None:
        self.driver = driver
        counts = (_START, (4, 0, 0, 4), (3, 0, 3, 2))
        self.laps: tuple[Pipeline, ...] = tuple(driver.ranks.pipeline_of(each) for each in counts)
        self._streams = direct.HeldStreams([], max_tokens=1)
        self._begun = 0

    async def begin(self, streams: int, prompt_tokens: int) -> None:
        self._begun += 1  # other prompts each time: what earlier legs left in the radix cache is not found again
        given = prompts(count=streams, length=prompt_tokens, seed=1000 * self._begun + streams)
        self._streams = direct.HeldStreams(given, max_tokens=longest_output(streams, prompt_tokens))
        await self._streams.start(self.driver, warm_tokens=WARM)  # type: ignore[arg-type]
        await self.step_ends()
        self._streams.take()

    async def end(self) -> None:
        await self._streams.stop()
        await self.driver.drain()

    async def times(self) -> list[list[float]]:
        return self._streams.take()

    async def step_ends(self) -> list[float]:
        ends: list[float] = (await self.driver.core.core("trace"))["ends_s"]
        return ends

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        return [report async for report in self.driver.refactor(target)]


async def _memory(rig: SglangRig, raw: dict[str, Any]) -> None:
    """What each rank holds, and its PSS, in each layout."""
    rows = []
    for target in (*rig.laps[1:], rig.laps[0]):
        await rig.move(target)
        for rank, status in enumerate(await rig.driver.status()):
            held = ",".join(map(str, status["layers"])) or "-"
            sizes = [status["weights_bytes"], status["kv_mapped_bytes"], memory_pss_bytes(status["pid"]) or 0]
            rows.append([f"{target.granularity} stages, rank {rank}", held, *map(mib, sizes)])
    table("memory of the ranks (MiB)", ["layout, rank", "decoders", "weights", "KV capacity", "PSS"], rows)
    raw["memory"] = rows


def _options() -> argparse.Namespace:
    made = parser("Measure moves inside SGLang while streams run.")
    made.add_argument("--sglang-python", type=Path, required=True, help="interpreter of an environment that has SGLang")
    add_options(made, streams=(1, 8))
    made.set_defaults(window_s=2.0)
    options = made.parse_args()
    if options.short:
        shorten(options)
    return options


async def main() -> int:
    options = _options()
    os.environ["FLEXPIPED_SGLANG_PYTHON"] = str(options.sglang_python)
    model = await asyncio.to_thread(checkpoint, options)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    async with driven(model, _START, more=("--max-total-tokens", str(_KV_TOKENS)), verify=False) as driver:
        rig = SglangRig(driver)
        await _memory(rig, raw)
        bounds += await measure(rig, options, raw, is_direct=True, commit_limit_ms=_COMMIT_LIMIT_MS)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
