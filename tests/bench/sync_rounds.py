"""Sync rounds: how fast streams decode while the KV cache is copied under them, beside the same streams undisturbed.

The KV cache is filled first, with prompts that are kept for others to come: they go along with the layers, so that
rounds take time however short the streams are. Then moves; for each, tokens/s from the first round to the commit over
tokens/s in the window before the move, on the same layout. The median over all moves counts.

Streams end and others begin all the time, so that contexts are as long in the rounds as before them: with streams that
only grow, a step slows down by its longer contexts, whether anything is copied or not.

Beside it stands what the engine's processes took of the processor for a token. Where that rises as much as the rate
falls, the round's own work has taken the cores from the steps; the rest is steps that wait.
"""

import argparse
import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice

import msgspec

from engines.native.adapter import NativeEngine
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.bench import direct
from tests.bench.processes import cpu_s
from tests.bench.program import checkpoint, even, parser, prompts, run, setup_of
from tests.bench.stats import median
from tests.bench.tables import Bound, mib, say, table, verdicts, write_json

_LAPS = (2, 1, 4, 2, 8, 4, 1)  # stages, from one to the next
_LIMIT_PERCENT = 10.0
_PROMPT_TOKENS, _FILL_TOKENS, _STREAM_TOKENS = 32, 2000, 400
_UNPACED_BYTES_PER_S = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One move. ``undisturbed`` and ``in_rounds`` are tokens/s; ``*_cpu_s`` what a token took of the processor."""

    name: str
    undisturbed: float
    in_rounds: float
    undisturbed_cpu_s: float
    in_rounds_cpu_s: float
    rounds_s: float
    sent_bytes: int

    @property
    def slowdown_percent(self) -> float:
        return 100 * (1 - self.in_rounds / self.undisturbed)

    @property
    def more_cpu_percent(self) -> float:
        return 100 * (self.in_rounds_cpu_s / self.undisturbed_cpu_s - 1)


def _options() -> argparse.Namespace:
    made = parser("Measure how fast streams decode during the rounds of KV copy.")
    made.add_argument("--moves", type=int, default=21)
    made.add_argument("--streams", type=int, default=8)
    made.add_argument("--fill-tokens", type=int, default=40_000, help="tokens whose KV cache is kept before it begins")
    made.add_argument("--window-s", type=float, default=3.0, help="undisturbed window before each move")
    made.add_argument("--copy-per-s", type=int, default=0, help="cap of handover.copy_per_s in bytes; 0: auto")
    made.add_argument("--unpaced", action="store_true", help="rounds as fast as they can be: the comparison")
    options = made.parse_args()
    if options.short:
        options.moves, options.fill_tokens, options.window_s = 2, 4000, 0.5
    if options.unpaced:
        options.copy_per_s = _UNPACED_BYTES_PER_S
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A moment, and what the engine's processes had taken of the processor by then."""

    at_s: float
    cpu_s: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> "_Reading":
        return cls(at_s=time.monotonic(), cpu_s=cpu_s(pids))


def _tokens(times_s: Sequence[float], start: _Reading, end: _Reading) -> int:
    return bisect_left(times_s, end.at_s) - bisect_left(times_s, start.at_s)


async def _measured(
    engine: NativeEngine, target: Pipeline, options: argparse.Namespace, *, seeds: Iterator[int]
) -> Seen:
    """Wait until contexts are of all lengths; move, and count before it and in its rounds."""
    streams = direct.RenewedStreams(
        count=options.streams,
        prompts=(prompts(count=1, length=_PROMPT_TOKENS, seed=seed)[0] for seed in seeds),
        max_tokens=_STREAM_TOKENS,
    )
    await streams.start(engine)
    pids = (engine.core_pid, *engine.worker_pids)
    try:
        began = _Reading.now(pids)
        await asyncio.sleep(options.window_s)
        moved = _Reading.now(pids)
        name = f"{engine.pipeline.granularity} -> {target.granularity}"
        syncing = committing = moved
        sent_bytes = 0
        async for report in engine.refactor(target):
            if report.phase is HandoverPhase.SYNCING and syncing is moved:
                syncing = _Reading.now(pids)
            elif report.phase is HandoverPhase.COMMITTING and committing is moved:
                committing, sent_bytes = _Reading.now(pids), report.kv_bytes
        times_s = streams.take()
    finally:
        await streams.stop()
    undisturbed, in_rounds = _tokens(times_s, began, moved), _tokens(times_s, syncing, committing)
    return Seen(
        name=name,
        undisturbed=undisturbed / (moved.at_s - began.at_s),
        in_rounds=in_rounds / (committing.at_s - syncing.at_s),
        undisturbed_cpu_s=(moved.cpu_s - began.cpu_s) / undisturbed,
        in_rounds_cpu_s=(committing.cpu_s - syncing.cpu_s) / in_rounds,
        rounds_s=committing.at_s - syncing.at_s,
        sent_bytes=sent_bytes,
    )


async def _fill(engine: NativeEngine, tokens: int) -> None:
    say(f"filling the KV cache with {tokens} tokens")
    for number in range(-(-tokens // _FILL_TOKENS)):
        await direct.complete(engine, prompts(count=1, length=_FILL_TOKENS, seed=-1 - number), max_tokens=1)
    counters = await engine.counters()
    say(f"{counters.kv_blocks_cached} KV blocks are kept")


def _print(seen: list[Seen]) -> None:
    names = list(dict.fromkeys(each.name for each in seen))
    rows = []
    for name in [*names, "all"]:
        of = [each for each in seen if name in (each.name, "all")]
        rows.append(
            [
                name,
                str(len(of)),
                f"{median(each.undisturbed for each in of):.0f}",
                f"{median(each.in_rounds for each in of):.0f}",
                f"{median(each.slowdown_percent for each in of):.1f} %",
                f"{median(each.more_cpu_percent for each in of):+.1f} %",
                f"{median(each.rounds_s for each in of):.2f}",
                mib(median(each.sent_bytes for each in of)),
                mib(median(each.sent_bytes / each.rounds_s for each in of)),
            ]
        )
    head = ["stages", "moves", "tok/s undisturbed", "in rounds", "slower by", "CPU a token", "rounds s", "MiB", "MiB/s"]
    table("decoding during the rounds of KV copy", head, rows)


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    engine_options = msgspec.structs.replace(
        direct.options_for(model, setup_of(options)), copy_bytes_per_s=options.copy_per_s
    )
    seen: list[Seen] = []
    async with direct.running(engine_options, even(1)) as engine:
        await _fill(engine, options.fill_tokens)
        seeds = count()
        for stages in islice(cycle(_LAPS), options.moves):
            seen.append(await _measured(engine, even(stages), options, seeds=seeds))
            last = seen[-1]
            what = f"slower by {last.slowdown_percent:.1f} %, processor time a token {last.more_cpu_percent:+.1f} %"
            say(f"{last.name}: {last.rounds_s:.2f} s of rounds, {what}")
    _print(seen)
    bounds = [
        Bound(
            what="decoding in rounds, slower by (median)",
            value=median(each.slowdown_percent for each in seen),
            limit=_LIMIT_PERCENT,
            at_most=True,
            unit="%",
        )
    ]
    verdicts(bounds)
    write_json(options.json, {"moves": [_wire(each) for each in seen]}, bounds)
    return 0


def _wire(each: Seen) -> dict[str, object]:
    return {
        "stages": each.name, "undisturbed_tokens_per_s": each.undisturbed, "in_rounds_tokens_per_s": each.in_rounds,
        "undisturbed_cpu_s_per_token": each.undisturbed_cpu_s, "in_rounds_cpu_s_per_token": each.in_rounds_cpu_s,
        "rounds_s": each.rounds_s, "sent_bytes": each.sent_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
