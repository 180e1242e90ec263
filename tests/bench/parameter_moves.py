"""Moves inside vLLM and SGLang: how long a rank takes to have the layers that come, loaded from files or kept.

The files are in the page cache either way. Each engine is started twice, without and with a keeper of parameters, and
the same layers go to the second rank and back; the first two moves, which fill the keeper, are not counted.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from engines.parameters.keeper import ParameterKeeper
from engines.served.engine import ServedEngine
from engines.served.ranks import Ranks
from engines.sglang.adapter import SglangEngine
from engines.sglang.options import SglangOptions
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.handover import HandoverPhase
from planner.model_graph import ModelGraph
from tests.bench import direct
from tests.bench.program import DEVICES, add_engine_pythons, checkpoint, parser, qwen_checkpoint, run, setup_of
from tests.bench.served_rig import common_options, graph_of
from tests.bench.stats import median
from tests.bench.tables import Bound, mib, ms, say, table, verdicts, write_json
from topology.units import GIB

_PLACES: Final = Ranks(device_ids=DEVICES[:2])
_FILLING: Final = 2  # moves


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Of one engine, with a keeper or without. ``weights_bytes``: of the layers of each move."""

    engine: str
    is_kept: bool
    weights_bytes: int
    prepare_s: tuple[float, ...]


def _options() -> argparse.Namespace:
    made = parser("Measure what layers take to come to a rank, loaded or kept.")
    add_engine_pythons(made)
    made.add_argument("--rounds", type=int, default=10, help="moves of each kind, there and back")
    made.add_argument("--qwen", action="store_true", help="a model of Qwen2.5-0.5B's shape")
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


def _made(name: str, python: Path, graph: ModelGraph, given: dict[str, Any], address: str) -> ServedEngine:
    told = {**given, "python": str(python), "device_ids": _PLACES.device_ids, "parameters": address}
    pipeline = _PLACES.pipeline_of(_counts(graph, moved=False))
    if name == "vLLM":
        return VllmEngine(VllmOptions(**told), pipeline, graph=graph)
    return SglangEngine(SglangOptions(**told, max_positions=graph.max_context_tokens), pipeline, graph=graph)


def _counts(graph: ModelGraph, *, moved: bool) -> tuple[int, int]:
    """Return the decoders of both ranks: half of them each, or a quarter on the first."""
    first = graph.num_decoders // (4 if moved else 2)
    return first, graph.num_decoders - first


@asynccontextmanager
async def _running(engine: ServedEngine) -> AsyncIterator[ServedEngine]:
    try:
        await engine.start(on_progress=lambda _message: None)
        yield engine
    finally:
        await engine.close()


async def _measured(
    name: str, python: Path, model: Path, options: argparse.Namespace, keeper: ParameterKeeper | None
) -> Moves:
    graph = graph_of(model)
    given = common_options(str(model), graph, setup_of(options), python=str(python))
    address = "" if keeper is None else keeper.address
    found: list[float] = []
    weights_bytes = 0
    async with _running(_made(name, python, graph, given, address)) as engine:
        for number in range(_FILLING + 2 * options.rounds):
            target = _PLACES.pipeline_of(_counts(graph, moved=number % 2 == 0))
            reports = await direct.move(engine, target)
            weights_bytes = reports[-1].weights_total_bytes
            found.append(max(each.elapsed_s for each in reports if each.phase is HandoverPhase.PREPARING))
    what = "loaded" if keeper is None else f"kept, {keeper.figures.hits_total} found"
    say(f"{name}, {what}: {ms(median(found[_FILLING:]))} ms")
    prepare_s = tuple(found[_FILLING:])
    return Moves(engine=name, is_kept=keeper is not None, weights_bytes=weights_bytes, prepare_s=prepare_s)


async def main() -> int:
    """Run the program; return its exit code."""
    options = _options()
    model = await asyncio.to_thread(qwen_checkpoint if options.qwen else checkpoint, options)
    found: list[Moves] = []
    for name, python in (("vLLM", options.vllm_python), ("SGLang", options.sglang_python)):
        if python is None:
            say(f"{name} is left out: no interpreter was named")
            continue
        keeper = ParameterKeeper(8 * GIB)
        async with keeper.serving():
            found += [await _measured(name, python, model, options, each) for each in (None, keeper)]
    rows, bounds = [], []
    for loaded, kept in zip(found[::2], found[1::2], strict=True):
        before, after = median(loaded.prepare_s), median(kept.prepare_s)
        rows.append([loaded.engine, mib(loaded.weights_bytes), ms(before), ms(after)])
        bounds.append(Bound(what=f"{loaded.engine}: loaded over kept", value=before / after, limit=None))
    table("preparing a move (medians)", ["engine", "MiB of layers", "loaded ms", "kept ms"], rows)
    verdicts(bounds)
    write_json(options.json, {"moves": [asdict(each) for each in found]}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
