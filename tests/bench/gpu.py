"""The native engine on a GPU, several workers on one: what it reaches of what the device can do.

Decoding against the device's memory bandwidth: a step must read the weights and the KV cache once. KV cache that goes
from one worker to another against copies through pinned memory. Commit pauses and gaps in moves under streams, and
what stopping and restarting would take. Not yet run on a GPU; with ``--stand-in`` the CPU stands in for one, which
proves the program and gives the CPU's figures.
"""

import argparse
import asyncio
import time
from itertools import pairwise
from typing import Any

from engines.native.compute import STAND_IN, open_compute
from tests.bench import direct
from tests.bench.device_rates import DeviceRates, device_rates
from tests.bench.gpu_rig import GpuSetup, graph_of
from tests.bench.handover_legs import phase_durations
from tests.bench.handover_measure import add_options, measure, shorten
from tests.bench.program import checkpoint, parser, prompts, run, wide_checkpoint
from tests.bench.rigs import WARM, direct_rig
from tests.bench.stats import median
from tests.bench.tables import Bound, mib, ms, say, table, verdicts, write_json
from tests.support.gpus import gpus

_PARTS = ("decoding", "migration", "moves")
_OF_COPY = 0.8  # KV migration reaches so much of the bandwidth of copies, at least
_MIGRATIONS = 4


def _options() -> argparse.Namespace:
    made = parser("Measure the native engine on a GPU.")
    made.add_argument("--stand-in", action="store_true", help="the CPU in place of a GPU, with a smaller model")
    made.add_argument("--kv-gib", type=float, default=16.0, help="KV cache")
    made.add_argument("--slice-mib", type=float, default=16.0, help="KV cache that is copied between two steps")
    made.add_argument("--only", choices=_PARTS, help="one part only")
    add_options(made, streams=(1, 32, 256))
    options = made.parse_args()
    if options.stand_in:
        options.kv_gib, options.threads = min(options.kv_gib, 0.25), 1
    if options.short:
        shorten(options)
    return options


def _setup(options: argparse.Namespace, visible: str) -> GpuSetup:
    model = checkpoint(options) if options.stand_in else wide_checkpoint(options)
    return GpuSetup(
        visible=visible,
        model=model,
        graph=graph_of(model),
        kv_cache_bytes=int(options.kv_gib * 2**30),
        max_num_seqs=max(options.streams),
        slice_bytes=int(options.slice_mib * 2**20),
        threads=options.threads,
    )


async def _decoding(setup: GpuSetup, rates: DeviceRates, options: argparse.Namespace) -> list[Bound]:
    """Compare steps of one stage with the time in which the device reads what they need."""
    rows, bounds = [], []
    async with direct.running(setup.native_options(), setup.even(1)) as engine:
        for count in options.streams:
            given = prompts(count=count, length=options.prompt_tokens, seed=count)
            streams = direct.HeldStreams(given, max_tokens=setup.longest(count, options.prompt_tokens))
            await streams.start(engine, warm_tokens=WARM)
            await engine.trace()
            before = streams.contexts
            await asyncio.sleep(options.window_s)
            contexts = [(first + last) / 2 for first, last in zip(before, streams.contexts, strict=True)]
            ends_s = (await engine.trace()).ends_s
            await streams.stop()
            await engine.drain()
            step_s = median(after - earlier for earlier, after in pairwise(ends_s))
            least_s = setup.step_bytes(contexts) / rates.read
            rows.append([str(count), ms(step_s), ms(least_s), f"{count / step_s:.0f}", f"{least_s / step_s:.0%}"])
            bounds.append(Bound(what=f"decoding, {count} streams: bound / step", value=least_s / step_s, limit=None))
            say(f"decoding, {count} streams: a step takes {ms(step_s)} ms, reading alone {ms(least_s)} ms")
    table("decoding, one stage", ["streams", "step ms", "reading ms", "tokens/s", "of the bound"], rows)
    return bounds


async def _migration(setup: GpuSetup, rates: DeviceRates, options: argparse.Namespace) -> list[Bound]:
    """Fill half of the KV cache, and move all decoders to another worker and back while nothing runs."""
    length = min(1024, setup.graph.max_context_tokens // 2)
    count = max(1, setup.kv_tokens // 2 // length)
    rows, reached = [], []
    async with direct.running(setup.native_options(), setup.even(1)) as engine:
        await direct.complete(engine, prompts(count=count, length=length, seed=1), max_tokens=1)
        say(f"migration: {count} prompts of {length} tokens are in the KV cache")
        for number in range(2 if options.short else _MIGRATIONS):
            reports = await direct.move(engine, setup.even(1, first_worker=(number + 1) % 2))
            if reports[-1].epoch is None:
                raise RuntimeError(f"the move did not happen: {reports[-1].message}")
            seconds = phase_durations(reports)["sync"]
            reached.append(reports[-1].kv_bytes / seconds)
            rows.append([str(number + 1), mib(reports[-1].kv_bytes), ms(seconds), f"{reached[-1] / 1e9:.2f}"])
    table("KV migration, all decoders, nothing else runs", ["move", "KV MiB", "took ms", "GB/s"], rows)
    rate = median(reached)
    return [
        Bound(
            what="KV migration / copies through pinned memory",
            value=rate / rates.through_host,
            limit=None if setup.is_stand_in else _OF_COPY,
        ),
        Bound(what="KV migration / copies within the device", value=rate / rates.copied_within, limit=None),
    ]


async def _moves(setup: GpuSetup, options: argparse.Namespace, raw: dict[str, Any]) -> list[Bound]:
    """Move layers among the workers under streams, and restart the engine instead."""
    async with direct_rig(setup.native_options(), laps=setup.laps, longest=setup.longest) as rig:
        return await measure(rig, options, raw, is_direct=True)


def _print_rates(rates: DeviceRates) -> None:
    head = ["GB/s", "read", "copied within", "to the host", "to the device"]
    values = (rates.read, rates.copied_within, rates.to_host, rates.to_device)
    table("the device", head, [["measured", *(f"{value / 1e9:.1f}" for value in values)]])


async def main() -> int:
    options = _options()
    visible = STAND_IN if options.stand_in else next(iter(gpus()), None)
    if visible is None:
        say("there is no GPU that takes work: --stand-in proves the program on the CPU")
        return 1
    began_s = time.monotonic()
    compute = await asyncio.to_thread(open_compute, visible)
    rates = await asyncio.to_thread(device_rates, compute.device, num_bytes=1 << (28 if options.short else 30))
    setup = await asyncio.to_thread(_setup, options, visible)
    _print_rates(rates)
    raw: dict[str, Any] = {"options": {key: str(value) for key, value in vars(options).items()}}
    bounds: list[Bound] = []
    if options.only in (None, "decoding"):
        bounds += await _decoding(setup, rates, options)
    if options.only in (None, "migration"):
        bounds += await _migration(setup, rates, options)
    if options.only in (None, "moves"):
        bounds += await _moves(setup, options, raw)
    verdicts(bounds)
    write_json(options.json, raw, bounds)
    say(f"done in {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    run(main)
