"""Moves inside vLLM in compiled mode: the fall back to eager, compiling outside, and loading what was compiled.

Two ranks of one thread; 4,4 -> 6,2 -> 2,6 decoders and round again, so each layout is compiled once and then lies in
vLLM's compile cache. Streams are renewed all the time. Gaps are between the ends of two steps, by the engine's clock.
"""

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from msgspec.structs import replace

from engines.checkpoint import read_checkpoint
from engines.errors import EngineError
from engines.protocol import GenerationRequest, SamplingParams
from engines.served.ranks import Ranks
from engines.vllm.adapter import VllmEngine
from engines.vllm.recompile import LOAD_LIMIT_S, Recompilation
from planner.model_graph import build_model_graph
from tests.bench import direct
from tests.bench.program import DEVICES, checkpoint, parser, prompts, run, setup_of, whole_numbers
from tests.bench.stats import gaps_inside, largest_gap, median, percentile
from tests.bench.tables import Bound, ms, say, table, verdicts, write_json
from tests.bench.vllm_rig import options_for

_RANKS = Ranks(device_ids=DEVICES[:2])
LAYOUTS = tuple(_RANKS.pipeline_of(counts) for counts in ((4, 4), (6, 2), (2, 6)))
_TOKENS = 256  # of one stream, before the next takes its place
_GAP_LIMIT = 2.0  # times the undisturbed p99 of the compiled steps


def _options() -> argparse.Namespace:
    made = parser("Measure moves of vLLM in compiled mode.")
    made.add_argument("--vllm-python", type=Path, required=True, help="interpreter of an environment that has vLLM")
    made.add_argument("--streams", type=whole_numbers, default=(1, 8), help="numbers of streams")
    made.add_argument("--moves", type=int, default=6, help="moves for each number of streams")
    made.add_argument("--window-s", type=float, default=3.0, help="window in which tokens are counted")
    options = made.parse_args()
    if options.short:
        options.moves, options.window_s, options.streams = 2, 1.0, (2,)
    return options


class Crowd:
    """Streams that are renewed when they end."""

    def __init__(self, engine: VllmEngine, count: int) -> None:
        self._engine = engine
        self._prompts = prompts(count=count, length=32, seed=count)
        self._tasks = [asyncio.create_task(self._go_on(index)) for index in range(count)]
        self.tokens = 0

    async def _go_on(self, index: int) -> None:
        params = SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
        with suppress(EngineError):
            while True:
                wanted = GenerationRequest(
                    request_id=f"crowd-{index}", prompt_token_ids=tuple(self._prompts[index]), sampling=params
                )
                async for chunk in self._engine.generate(wanted):
                    self.tokens += len(chunk.token_ids)

    async def rate(self, window_s: float) -> float:
        """Return the tokens per second in a window from now on."""
        before, began_s = self.tokens, time.monotonic()
        await asyncio.sleep(window_s)
        return (self.tokens - before) / (time.monotonic() - began_s)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._engine.drain()


class Bench:
    def __init__(self, engine: VllmEngine, ended: list[Recompilation], options: argparse.Namespace) -> None:
        self._engine, self._ended, self._options = engine, ended, options

    async def measure(self, streams: int) -> list[dict[str, Any]]:
        crowd = Crowd(self._engine, streams)
        await crowd.rate(self._options.window_s)  # the first ones warm up
        layouts = list(islice(cycle(LAYOUTS), self._options.moves + 1))
        legs = [await self._leg(crowd, target) for _, target in pairwise(layouts)]
        legs[-1]["eager_per_s"] = await self._stay_eager(crowd)
        await crowd.end()
        await direct.move(self._engine, LAYOUTS[0])
        await self._engine.recompiled()
        return legs

    async def _leg(self, crowd: Crowd, target: Any) -> dict[str, Any]:
        """One move, and the return to compiled code."""
        await self._engine.trace()
        began_s = time.monotonic()
        compiled_per_s = await crowd.rate(self._options.window_s)
        moved_s = time.monotonic()
        reports = await direct.move(self._engine, target)
        retired_s = time.monotonic()
        meanwhile_per_s = await crowd.rate(self._options.window_s)
        await self._engine.recompiled()
        again_s = time.monotonic()
        await crowd.rate(self._options.window_s)
        ends_s = (await self._engine.trace())["ends_s"]
        ended = self._ended[-1]
        assert ended.compiled, ended.message
        say(f"{target.stages[0].num_decoders} decoders on rank 0: {ended.message}")
        undisturbed = [*gaps_inside(ends_s, began_s, moved_s), *gaps_inside(ends_s, again_s, ends_s[-1])]
        return {
            "undisturbed_p99_s": percentile(undisturbed, 0.99),
            "move_gap_s": largest_gap(ends_s, moved_s, retired_s),
            "commit_pause_s": reports[-1].commit_pause_s,
            "first_eager_gap_s": largest_gap(ends_s, retired_s - 0.1, retired_s + 0.1),
            "compile_s": ended.compile_s,
            "eager_for_s": ended.duration_s,
            "load_s": ended.load_s,
            "stall_s": ended.stall_s,
            "compiled_per_s": compiled_per_s,
            "meanwhile_per_s": meanwhile_per_s if ended.compile_s else None,
        }

    async def _stay_eager(self, crowd: Crowd) -> float:
        """Return the tokens per second of a rank that has fallen back and whose helper has nothing to do."""
        await self._engine.arm_failpoint("worker.slow_load", "skip", rank=0)
        target = next(layout for layout in LAYOUTS if layout != self._engine.pipeline)
        await direct.move(self._engine, target)
        await self._engine.recompiled()
        await self._engine.arm_failpoint("", "", rank=0)
        return await crowd.rate(self._options.window_s)


def _print(streams: int, legs: Sequence[dict[str, Any]]) -> list[Bound]:
    compiled = [leg for leg in legs if leg["compile_s"]]
    where = f"vLLM compiled, {streams} stream{'s' * (streams != 1)}"
    rows = [
        ["largest gap between two steps in a move, ms", ms(median(leg["move_gap_s"] for leg in legs))],
        ["undisturbed p99 of compiled steps, ms", ms(median(leg["undisturbed_p99_s"] for leg in legs))],
        ["commit pause, ms", ms(median(leg["commit_pause_s"] or 0.0 for leg in legs))],
        ["largest gap around the first eager steps, ms", ms(median(leg["first_eager_gap_s"] for leg in legs))],
        ["load as the helper saw it, ms of CPU", ms(median(leg["load_s"] for leg in legs))],
        ["steps stalled by the load: median, ms", ms(median(leg["stall_s"] for leg in legs))],
        ["steps stalled by the load: longest, ms", ms(max(leg["stall_s"] for leg in legs))],
        ["tokens/s compiled", f"{median(leg['compiled_per_s'] for leg in legs):.0f}"],
        ["tokens/s eager", f"{legs[-1]['eager_per_s']:.0f}"],
    ]
    if compiled:  # else all layouts lay in the cache
        rows += [
            ["compiling in helpers, both ranks, s", f"{median(leg['compile_s'] for leg in compiled):.1f}"],
            ["eager until compiled again, s", f"{median(leg['eager_for_s'] for leg in compiled):.1f}"],
            ["tokens/s eager beside a helper", f"{median(leg['meanwhile_per_s'] for leg in compiled):.0f}"],
        ]
    table(where, ["medians over moves", "value"], rows)
    ratio = median(leg["move_gap_s"] / leg["undisturbed_p99_s"] for leg in legs)
    stall_s = max(leg["stall_s"] for leg in legs)
    return [
        Bound(what=f"{where}: gap in a move / p99", value=ratio, limit=_GAP_LIMIT, at_most=True),
        Bound(what=f"{where}: stall of a load", value=stall_s, limit=LOAD_LIMIT_S, at_most=True, unit="s"),
    ]


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    read = read_checkpoint(model)
    graph = build_model_graph(read.config, read.tensors, dtype="float32")
    ended: list[Recompilation] = []
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    with TemporaryDirectory(prefix="flexpiped-bench-cache-") as cache:  # else nothing would be left to compile
        vllm = options_for(model, graph, setup_of(options), python=options.vllm_python)
        vllm = replace(vllm, device_ids=_RANKS.device_ids, compile=True, env={"VLLM_CACHE_ROOT": cache})
        engine = VllmEngine(vllm, LAYOUTS[0], graph=graph, on_recompiled=ended.append)
        try:
            await engine.start(on_progress=lambda _message: None)
            for streams in options.streams:
                legs = await Bench(engine, ended, options).measure(streams)
                raw[str(streams)] = legs
                bounds += _print(streams, legs)
        finally:
            await engine.close()
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
