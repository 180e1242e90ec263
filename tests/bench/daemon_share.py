"""The daemon's share: the same engine over HTTP and driven directly, in turns. Tokens/s, p99 gap, CPU time per token.

The gap is between two tokens of one stream as the client sees them; where the server holds text back (half a
character), two tokens come as one event, so the share of tokens that came as events is printed beside.
"""

import argparse
import os
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from engines.native.adapter import NativeEngine
from tests.bench import direct
from tests.bench.daemon_process import DaemonProcess
from tests.bench.http_client import HttpClient
from tests.bench.load_messages import Load
from tests.bench.processes import cpu_s
from tests.bench.program import even, parser, prompts, run, whole_numbers
from tests.bench.rigs import both_ways
from tests.bench.stats import median, percentile
from tests.bench.tables import Bound, ms, say, table, verdicts, write_json

_ROLES = ("client", "daemon", "text", "core", "workers")


@dataclass(slots=True)
class Seen:
    """What was seen of one way at one number of streams: an entry for each turn, gaps pooled."""

    rates: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    events: int = 0
    cpu_s: dict[str, float] = field(default_factory=dict)

    def add(self, load: Load, used_s: Mapping[str, float]) -> None:
        self.rates.append(load.tokens / (load.ended_s - load.started_s))
        self.gaps_s += [b - a for times in load.times_s for a, b in pairwise(times)]
        self.tokens += load.tokens
        self.events += sum(map(len, load.times_s))
        for role, seconds in used_s.items():
            self.cpu_s[role] = self.cpu_s.get(role, 0.0) + seconds

    def cpu_us_per_token(self, role: str) -> float:
        """Return the CPU time of a role for each token; 0 where there is no such process."""
        return self.cpu_s.get(role, 0.0) / self.tokens * 1e6

    def to_wire(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "tokens_per_s": self.rates,
            "gap_p50_s": median(self.gaps_s),
            "gap_p99_s": percentile(self.gaps_s, 0.99),
            "events_per_token": self.events / self.tokens,
            "cpu_us_per_token": {role: self.cpu_us_per_token(role) for role in self.cpu_s},
        }


def _options() -> argparse.Namespace:
    made = parser("Measure what the daemon costs.")
    made.add_argument("--stages", type=int, default=1)
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tokens", type=int, default=256, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")
    options = made.parse_args()
    if options.short:
        options.rounds, options.tokens = 1, 64
    return options


def _roles(server: DaemonProcess, client: HttpClient) -> dict[str, tuple[int, ...]]:
    pids = server.pids()
    return {
        "client": (client.pid,),
        "daemon": (pids.daemon,),
        "text": pids.text,
        "core": pids.core,
        "workers": pids.workers,
    }


async def _measured(
    work: Coroutine[Any, Any, Load], roles: Mapping[str, tuple[int, ...]]
) -> tuple[Load, dict[str, float]]:
    """Await the work; return its load and the CPU time that each role used meanwhile."""
    before = {role: cpu_s(pids) for role, pids in roles.items()}
    load = await work
    return load, {role: cpu_s(pids) - before[role] for role, pids in roles.items()}


async def _rounds(
    engine: NativeEngine, server: DaemonProcess, client: HttpClient, options: argparse.Namespace
) -> dict[tuple[str, int], Seen]:
    over_http = _roles(server, client)
    driven = {"client": (os.getpid(),), "core": (engine.core_pid,), "workers": engine.worker_pids}
    seen: dict[tuple[str, int], Seen] = {}
    for number in range(-1, options.rounds):  # the first warms up
        for streams in options.streams:
            given = prompts(count=streams, length=options.prompt_tokens, seed=number * 1000 + streams)
            for way in ("HTTP", "direct") if number % 2 else ("direct", "HTTP"):
                if way == "HTTP":
                    work, roles = client.run(server.url, given, max_tokens=options.tokens), over_http
                else:
                    work, roles = direct.complete(engine, given, max_tokens=options.tokens), driven
                load, used_s = await _measured(work, roles)
                if number < 0:
                    continue
                of_way = seen.setdefault((way, streams), Seen())
                of_way.add(load, used_s)
                say(f"round {number + 1} of {options.rounds}, {streams} streams, {way}: {of_way.rates[-1]:.0f} tok/s")
    return seen


def _print(seen: Mapping[tuple[str, int], Seen]) -> None:
    rows = []
    for (way, streams), of_way in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0])):
        costs = [of_way.cpu_us_per_token(role) for role in _ROLES]
        rows.append(
            [
                f"{streams} streams, {way}",
                f"{median(of_way.rates):.0f}",
                ms(median(of_way.gaps_s)),
                ms(percentile(of_way.gaps_s, 0.99)),
                f"{of_way.events / of_way.tokens:.2f}",
                *(f"{cost:.0f}" for cost in [*costs, sum(costs)]),
            ]
        )
    head = ["CPU in us per token", "tokens/s", "gap p50 ms", "p99 ms", "events/token", *_ROLES, "all"]
    table("the daemon's share", head, rows)


def _bounds(seen: Mapping[tuple[str, int], Seen], streams: int) -> list[Bound]:
    http, driven = seen["HTTP", streams], seen["direct", streams]
    return [
        Bound(
            what=f"{streams} streams: tokens/s, HTTP / direct",
            value=median(http.rates) / median(driven.rates),
            limit=None,
        ),
        Bound(
            what=f"{streams} streams: p99 gap, HTTP / direct",
            value=percentile(http.gaps_s, 0.99) / percentile(driven.gaps_s, 0.99),
            limit=None,
        ),
    ]


async def main() -> int:
    options = _options()
    began_s = time.monotonic()
    async with both_ways(options) as (client, server, engine):
        if options.stages > 1:
            await server.move(even(options.stages))
        say(f"all is up after {time.monotonic() - began_s:.1f} s")
        seen = await _rounds(engine, server, client, options)
    _print(seen)
    bounds = [bound for streams in options.streams for bound in _bounds(seen, streams)]
    verdicts(bounds)
    write_json(options.json, {f"{way}, {streams}": s.to_wire() for (way, streams), s in seen.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
