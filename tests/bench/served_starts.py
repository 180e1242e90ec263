"""Starts of vLLM and SGLang by where their layers are: in storage, in the page cache, or kept in host memory.

All kinds of both engines take turns. Kept layers are found with the page cache dropped, as after hours in which the
host read other files; the start before that one has found an empty keeper, and filled it. Only the model's files are
dropped: the engine's own programs and libraries stay in the page cache. An engine says itself how long it took to load
its weights: that is the part that where they are can change. The first start of each engine is not counted.
"""

import argparse
import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from engines.parameters.keeper import ParameterKeeper
from engines.served.engine import ServedEngine
from engines.served.logs import LogLine
from engines.served.ranks import Ranks
from engines.sglang.adapter import SglangEngine
from engines.sglang.options import SglangOptions
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from planner.layout import Pipeline
from planner.model_graph import ModelGraph
from planner.start_times import Origin
from tests.bench import direct
from tests.bench.page_cache import copied, set_up
from tests.bench.processes import cpu_s, descendants
from tests.bench.program import DEVICES, add_engine_pythons, checkpoint, parser, prompts, run, setup_of, wide_checkpoint
from tests.bench.served_rig import common_options, graph_of
from tests.bench.stats import median
from tests.bench.tables import Bound, say, table, verdicts, write_json
from tests.support.until import until
from topology.units import GIB, MIB

_RANK: Final = Ranks(device_ids=DEVICES[:1])
_BUDGET_BYTES: Final = 8 * GIB
_LOADED: Final = re.compile(r"Loading weights took (?P<vllm>[\d.]+) s|Load weight end\. elapsed=(?P<sglang>[\d.]+) s")


class Kind(Enum):
    """What a start finds: where the layers are, and whether a keeper is there."""

    STORAGE = "storage"
    PAGE_CACHE = "page cache"
    FILLING = "page cache, kept from then on"
    KEPT = "kept"

    @property
    def origin(self) -> Origin:
        return Origin.PAGE_CACHE if self is Kind.FILLING else Origin(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start, in seconds from nothing.

    ``weights_s``: what the engine says that it took to load its weights; ``cpu_s``: what its processes have computed
    until it was ready, which says more than ``ready_s`` where others keep the cores busy.
    """

    engine: str
    kind: str
    ready_s: float
    token_s: float
    weights_s: float
    cpu_s: float
    layers_found: int  # at the keeper
    in_page_cache: float  # share of the files, just before the start


def _options() -> argparse.Namespace:
    made = parser("Measure starts of vLLM and SGLang by where their layers are.")
    add_engine_pythons(made)
    made.add_argument("--rounds", type=int, default=5, help="starts of each kind")
    made.add_argument("--dtype", default="bfloat16", help="what is computed in")
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


class _Log:
    """Reads what an engine says of its loading."""

    def __init__(self) -> None:
        self.weights_s = float("nan")

    def note(self, line: LogLine) -> None:
        if found := _LOADED.search(line.message):
            self.weights_s = float(found["vllm"] or found["sglang"])
        elif " came from the memory of the host" in line.message:
            say(line.message)


class _Bench:
    """Starts one engine again and again."""

    def __init__(self, name: str, python: Path, model: Path, options: argparse.Namespace) -> None:
        self.name = name
        self.files = sorted(model.glob("*.safetensors"))
        self._graph = graph_of(model, dtype=options.dtype)
        given = common_options(str(model), self._graph, setup_of(options), python=str(python))
        self._given = given | {"device_ids": _RANK.device_ids, "dtype": options.dtype}

    async def starts(self, kinds: Iterable[Kind]) -> list[Start]:
        """Start it in each of these ways."""
        keeper = ParameterKeeper(_BUDGET_BYTES)
        async with keeper.serving():
            return [await self._start(kind, keeper) for kind in kinds]

    async def _start(self, kind: Kind, keeper: ParameterKeeper) -> Start:
        await until(lambda: keeper.figures.idle_layers == keeper.figures.layers)  # no engine has them any more
        share = await asyncio.to_thread(set_up, kind.origin, self.files)
        hits, log = keeper.figures.hits_total, _Log()
        address = keeper.address if kind in (Kind.FILLING, Kind.KEPT) else ""
        began_s = time.monotonic()
        async with _running(self._made(address, log.note)) as engine:
            ready_s, computed_s = time.monotonic() - began_s, cpu_s(descendants(os.getpid()))
            await direct.complete(engine, prompts(count=1, length=8, seed=1), max_tokens=1)
            token_s = time.monotonic() - began_s
        found = keeper.figures.hits_total - hits
        if kind is Kind.KEPT and found != self._graph.num_decoders:
            raise RuntimeError(f"{found} layers were found at the keeper: {keeper.figures.refusal or 'why is unknown'}")
        words = f"ready in {ready_s:.2f} s ({computed_s:.1f} of CPU), weights {log.weights_s:.2f} s"
        say(f"{self.name}, {kind.value}: {words}")
        return Start(
            engine=self.name,
            kind=kind.value,
            ready_s=ready_s,
            token_s=token_s,
            weights_s=log.weights_s,
            cpu_s=computed_s,
            layers_found=found,
            in_page_cache=share,
        )

    def _made(self, address: str, on_log: Callable[[LogLine], None]) -> ServedEngine:
        graph, pipeline = self._graph, _whole(self._graph)
        given: dict[str, Any] = self._given | {"parameters": address}
        if self.name == "vLLM":
            return VllmEngine(VllmOptions(**given), pipeline, graph=graph, on_log=on_log)
        options = SglangOptions(**given, max_positions=graph.max_context_tokens)
        return SglangEngine(options, pipeline, graph=graph, on_log=on_log)


def _whole(graph: ModelGraph) -> Pipeline:
    return _RANK.pipeline_of((graph.num_decoders,))


@asynccontextmanager
async def _running(engine: ServedEngine) -> AsyncIterator[ServedEngine]:
    try:
        await engine.start(on_progress=lambda _message: None)
        yield engine
    finally:
        await engine.close()


def _of(engine: str, kind: Kind, starts: Sequence[Start]) -> list[Start]:
    return [each for each in starts if (each.engine, each.kind) == (engine, kind.value)]


def _seconds(values: Sequence[float]) -> str:
    """Return the median, with the least and the most."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _row(engine: str, kind: Kind, starts: Sequence[Start]) -> list[str]:
    mine = _of(engine, kind, starts)
    return [
        f"{engine}, {kind.value}",
        f"{median(each.in_page_cache for each in mine):.0%}",
        _seconds([each.weights_s for each in mine]),
        _seconds([each.ready_s for each in mine]),
        f"{median(each.cpu_s for each in mine):.1f}",
        _seconds([each.token_s for each in mine]),
    ]


def _gains(engine: str, starts: Sequence[Start]) -> list[Bound]:
    """Return the other kinds over kept, of weights and of whole starts: of each round, and the median of these."""
    found = []
    for what in ("weights_s", "ready_s", "cpu_s"):
        kept = [getattr(each, what) for each in _of(engine, Kind.KEPT, starts)]
        for kind in (Kind.STORAGE, Kind.PAGE_CACHE):
            others = [getattr(each, what) for each in _of(engine, kind, starts)]
            value = median(other / mine for other, mine in zip(others, kept, strict=True))
            name = f"{engine}, {what.removesuffix('_s')}: {kind.value} over kept"
            found.append(Bound(what=name, value=value, limit=None))
    return found


async def _measured(benches: Sequence[_Bench], rounds: int) -> list[Start]:
    for bench in benches:  # reads its libraries, and compiles what it keeps compiled
        await bench.starts([Kind.PAGE_CACHE])
    return [start for _ in range(rounds) for bench in benches for start in await bench.starts(Kind)]


async def main() -> int:
    """Run the program; return its exit code."""
    options = _options()
    directory = await asyncio.to_thread(checkpoint if options.short else wide_checkpoint, options)
    engines = {"vLLM": options.vllm_python, "SGLang": options.sglang_python}
    names = [name for name, python in engines.items() if python is not None]
    for name in engines.keys() - names:
        say(f"{name} is left out: no interpreter was named")
    with TemporaryDirectory(prefix="flexpiped-bench-", dir=directory.parent) as folder:
        model = await asyncio.to_thread(copied, directory, into=Path(folder) / "model")
        benches = [_Bench(name, engines[name], model, options) for name in names]
        starts = await _measured(benches, options.rounds)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    rows = [_row(name, kind, starts) for name in names for kind in Kind]
    head = ["layers from", "files in page cache", "weights s", "ready s", "CPU s", "first token s"]
    title = f"starts with one rank, {size / MIB:.0f} MiB of files, in {options.dtype} (medians, least and most)"
    table(title, head, rows)
    gains = [gain for name in names for gain in _gains(name, starts)]
    verdicts(gains)
    write_json(options.json, {"starts": [asdict(each) for each in starts]}, gains)
    return 0


if __name__ == "__main__":
    run(main)
