"""Starts of the native engine by where its parameters are: in storage, in the page cache, or kept in host memory.

Kept ones are found with the page cache dropped, as after hours in which the host read other files. The files are two
copies: what is pinned of one, or mapped by other programs, is no matter for the other. Beside whole starts,
what one stage takes to have half of the decoders, by itself: in a live move a neighbour maps the files, and what is
mapped stays in the page cache, so that storage cannot be measured there. Moves are measured with and without a keeper.
"""

import argparse
import asyncio
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec
import torch

from engines.checkpoint import read_checkpoint
from engines.native.layer_source import LayerSource
from engines.native.weights import WeightFiles
from engines.parameters.client import ParameterClient
from engines.parameters.keeper import ParameterKeeper
from planner.handover import HandoverPhase
from planner.layout import Pipeline, pipeline_of
from planner.start_times import Origin
from tests.bench import direct
from tests.bench.page_cache import copied, set_up
from tests.bench.program import DEVICES, checkpoint, parser, prompts, qwen_checkpoint, run, setup_of
from tests.bench.stats import median
from tests.bench.tables import ms, say, table, write_json
from tests.support.until import until
from topology.units import GIB, MIB

_DTYPES: Final = ("bfloat16", "float32")
_DECODER: Final = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one dtype and origin, in seconds. ``token_s``: from nothing to the first token; ``load_s``: of one stage."""

    dtype: str
    origin: str
    ready_s: float
    token_s: float
    load_s: float
    in_page_cache: float  # share of the files, just before the start


def _options() -> argparse.Namespace:
    made = parser("Measure starts of the native engine by where its parameters are.")
    made.add_argument("--rounds", type=int, default=5, help="starts of each kind")
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """The model, and its layout of so many stages."""

    directory: Path
    num_decoders: int

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted(self.directory.glob("*.safetensors")))

    def layout(self, stages: int) -> Pipeline:
        cuts = [round(self.num_decoders * index / stages) for index in range(1, stages)]
        return pipeline_of(device_ids=DEVICES[:stages], cuts=cuts, num_decoders=self.num_decoders)


class _Bench:
    """Measures one dtype."""

    def __init__(self, model: _Model, options: argparse.Namespace, dtype: str) -> None:
        self._model = model
        self._dtype = dtype
        setup = direct.options_for(model.directory, setup_of(options))
        self._engine = msgspec.structs.replace(setup, dtype=dtype)

    async def start(self, origin: Origin, address: str) -> Figures:
        """Start an engine of one stage, and have a stage's part read beside it, before."""
        load_s = await self._load(origin, address)
        share = await asyncio.to_thread(set_up, origin, self._model.files)
        began_s = time.monotonic()
        options = msgspec.structs.replace(self._engine, parameters=address)
        async with direct.running(options, self._model.layout(1)) as engine:
            ready_s = time.monotonic() - began_s
            await direct.complete(engine, prompts(count=1, length=8, seed=1), max_tokens=1)
            token_s = time.monotonic() - began_s
        return Figures(
            dtype=self._dtype,
            origin=origin.value,
            ready_s=ready_s,
            token_s=token_s,
            load_s=load_s,
            in_page_cache=share,
        )

    async def _load(self, origin: Origin, address: str) -> float:
        await asyncio.to_thread(set_up, origin, self._model.files)
        client = ParameterClient(address, of="bench")
        try:
            return await asyncio.to_thread(self._half_of_the_decoders, client)
        finally:
            client.close()

    def _half_of_the_decoders(self, client: ParameterClient) -> float:
        """Read the first half as a stage worker does; return the seconds."""
        found = read_checkpoint(self._model.directory)
        names: dict[int, list[str]] = defaultdict(list)
        for name in found.tensors:
            if decoder := _DECODER.search(name):
                names[int(decoder[1])].append(name)
        dtype: torch.dtype = getattr(torch, self._dtype)
        began_s = time.monotonic()
        source = LayerSource(WeightFiles(found, dtype=dtype), client)
        held = []
        for index in range(self._model.num_decoders // 2):
            same = {name: name for name in names[index]}
            read = source.read(str(index), same, dtypes=dict.fromkeys(same, dtype))
            source.populate(read, same, threading.Event())
            held.append(read)
        return time.monotonic() - began_s

    async def move(self, address: str) -> float:
        """Return what the preparation of a move from one stage to two takes that goes there for the second time."""
        options = msgspec.structs.replace(self._engine, parameters=address)
        async with direct.running(options, self._model.layout(1)) as engine:
            for stages in (2, 1):
                await direct.move(engine, self._model.layout(stages))
            reports = await direct.move(engine, self._model.layout(2))
        return max(each.elapsed_s for each in reports if each.phase is HandoverPhase.PREPARING)


@asynccontextmanager
async def _filled(bench: _Bench) -> AsyncIterator[ParameterKeeper]:
    """Have a keeper that holds all layers, of which no engine is there any more."""
    keeper = ParameterKeeper(8 * GIB)
    async with keeper.serving():
        await bench.start(Origin.PAGE_CACHE, keeper.address)
        await until(lambda: keeper.figures.idle_layers == keeper.figures.layers)
        yield keeper


async def _measure(
    plain: _Bench, kept: _Bench, options: argparse.Namespace, dtype: str
) -> tuple[list[Figures], dict[str, float]]:
    found: list[Figures] = []
    moves: dict[Origin, list[float]] = {Origin.PAGE_CACHE: [], Origin.KEPT: []}
    async with _filled(kept) as keeper:
        for number in range(options.rounds):
            for origin in Origin:
                bench, address = (kept, keeper.address) if origin is Origin.KEPT else (plain, "")
                found.append(await bench.start(origin, address))
                say(f"{dtype}, round {number + 1}, {origin.value}: first token after {found[-1].token_s:.2f} s")
            moves[Origin.PAGE_CACHE].append(await plain.move(""))
            moves[Origin.KEPT].append(await kept.move(keeper.address))
    return found, {origin.value: median(each) for origin, each in moves.items()}


def _row(dtype: str, origin: Origin, found: Sequence[Figures], moves: dict[str, float]) -> list[str]:
    mine = [each for each in found if (each.dtype, each.origin) == (dtype, origin.value)]
    return [
        f"{dtype}, {origin.value}",
        f"{median(each.in_page_cache for each in mine):.0%}",
        ms(median(each.ready_s for each in mine)),
        ms(median(each.token_s for each in mine)),
        ms(median(each.load_s for each in mine)),
        ms(moves.get(origin.value, float("nan"))),
    ]


def _copied(directory: Path, *, into: Path) -> _Model:
    """Copy a model, so that nobody else has its files mapped."""
    copied(directory, into=into)
    decoders: int = json.loads((into / "config.json").read_text())["num_hidden_layers"]
    return _Model(directory=into, num_decoders=decoders)


async def main() -> int:
    """Run the program; return its exit code."""
    options = _options()
    directory = await asyncio.to_thread(checkpoint if options.short else qwen_checkpoint, options)
    found: list[Figures] = []
    rows, moves = [], {}
    with TemporaryDirectory(prefix="flexpiped-bench-", dir=directory.parent) as folder:
        models = [await asyncio.to_thread(_copied, directory, into=Path(folder) / name) for name in ("plain", "kept")]
        for dtype in _DTYPES:
            plain, kept = (_Bench(model, options, dtype) for model in models)
            mine, moves[dtype] = await _measure(plain, kept, options, dtype)
            found += mine
            rows += [_row(dtype, origin, mine, moves[dtype]) for origin in Origin]
        size = sum(file.stat().st_size for file in models[0].files)
    head = ["computed in, parameters from", "in page cache", "ready ms", "first token ms", "half a model ms", "move ms"]
    table(f"starts with one stage, {size / MIB:.0f} MiB of files (medians)", head, rows)
    write_json(options.json, {"starts": [asdict(each) for each in found], "moves_s": moves}, [])
    return 0


if __name__ == "__main__":
    run(main)
