"""Streams through flexpiped, through nginx as a reverse proxy, and from the backend directly, in turns.

The backend is a stand-in that sends events (``tests.bench.sse_backend``); both proxies reach it by the same Unix
socket, with one process each. Tokens/s with streams that are as fast as they are taken; what is added to the time that
a token is on its way, with streams that have a pace; and CPU time per token. Without nginx its column is left out.
"""

import argparse
import math
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tests.bench.nginx import nginx, nginx_path
from tests.bench.plain_server import plain_server
from tests.bench.processes import ROOT, command_of, cpu_s, descendants
from tests.bench.program import parser, run, whole_numbers
from tests.bench.proxy_streams import stream
from tests.bench.stats import median, percentile
from tests.bench.tables import Bound, ms, say, table, times, verdicts, write_json

THROUGH, NGINX, DIRECTLY = "flexpiped", "nginx", "directly"
_PROCESSES: Final = {THROUGH: "tests.bench.front_app", NGINX: "nginx: worker", DIRECTLY: ""}
_LEAST_OF_NGINX, _MOST_ADDED_S = 0.65, 0.0003


@dataclass(slots=True)
class Seen:
    """What was seen of one way at one number of connections, over all rounds."""

    rates: list[float] = field(default_factory=list)
    on_the_way_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    used_s: float = 0.0
    paced_tokens: int = 0
    paced_used_s: float = 0.0

    @property
    def cpu_us(self) -> float:
        return self.used_s / self.tokens * 1e6 if self.tokens else math.nan

    @property
    def paced_cpu_us(self) -> float:
        return self.paced_used_s / self.paced_tokens * 1e6 if self.paced_tokens else math.nan

    def to_wire(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "tokens_per_s": self.rates,
            "on_the_way_p50_s": median(self.on_the_way_s),
            "on_the_way_p99_s": percentile(self.on_the_way_s, 0.99),
            "first_p50_s": median(self.first_s),
            "cpu_us_per_token": self.cpu_us,
            "paced_cpu_us_per_token": self.paced_cpu_us,
        }


def _options() -> argparse.Namespace:
    made = parser("Compare streaming through flexpiped with nginx and with the backend.")
    made.add_argument("--connections", type=whole_numbers, default=(1, 32, 256))
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tokens", type=int, default=100_000, help="of all streams of a turn at full speed together")
    made.add_argument("--pace-ms", type=float, default=50.0, help="from one token of a stream to its next")
    made.add_argument("--paced-tokens", type=int, default=60, help="of each stream that has a pace")
    options = made.parse_args()
    if options.short:
        options.rounds, options.tokens, options.paced_tokens = 1, 4_000, 10
    return options


@asynccontextmanager
async def _all_ways() -> AsyncIterator[dict[str, str]]:
    """Start the backend and the proxies before it; yield the URLs."""
    binary = nginx_path()
    if binary is None:
        say("nginx is not installed (apt-get install nginx-light): it is left out")
    with TemporaryDirectory(prefix="flexpiped-bench-nginx-") as name:
        folder, socket = Path(name), Path(name) / "backend.sock"
        python, ours = Path(sys.executable), {"PYTHONPATH": str(ROOT)}
        async with AsyncExitStack() as stack:
            words = ["-m", "tests.bench.sse_backend", "--socket", str(socket)]
            urls = {DIRECTLY: await stack.enter_async_context(plain_server(python, words, environment=ours))}
            words = ["-m", "tests.bench.front_app", "--socket", str(socket)]
            front = plain_server(python, words, environment=ours, health="/healthz")
            urls[THROUGH] = await stack.enter_async_context(front)
            if binary is not None:
                urls[NGINX] = await stack.enter_async_context(nginx(binary, socket, folder))
            yield urls


def _pids(way: str) -> tuple[int, ...]:
    word = _PROCESSES[way]
    return tuple(
        pid for pid in descendants(os.getpid()) if word and word in command_of(pid) and "leash" not in command_of(pid)
    )


async def _turn(url: str, pids: tuple[int, ...], seen: Seen, *, connections: int, options: argparse.Namespace) -> None:
    before_s = cpu_s(pids)
    fast = await stream(url, connections=connections, tokens=options.tokens // connections, pace_s=0.0)
    between_s = cpu_s(pids)
    pace_s, tokens = options.pace_ms / 1e3, options.paced_tokens
    if connections == 1:  # a single stream is as fast as small models are, so that there is enough of it
        pace_s, tokens = pace_s / 10, tokens * 10
    paced = await stream(url, connections=connections, tokens=tokens, pace_s=pace_s)
    seen.rates.append(fast.tokens / fast.took_s)
    seen.tokens += fast.tokens
    seen.used_s += between_s - before_s
    seen.paced_tokens += paced.tokens
    seen.paced_used_s += cpu_s(pids) - between_s
    seen.on_the_way_s += paced.on_the_way_s
    seen.first_s += paced.first_s


async def _rounds(urls: Mapping[str, str], options: argparse.Namespace) -> dict[tuple[str, int], Seen]:
    seen: dict[tuple[str, int], Seen] = {}
    ways, pids = list(urls), {way: _pids(way) for way in urls}
    for number in range(options.rounds + 1):  # the first warms up
        shift = number % len(ways)
        for connections in options.connections:
            for way in [*ways[shift:], *ways[:shift]]:
                into = seen.setdefault((way, connections), Seen()) if number else Seen()
                await _turn(urls[way], pids[way], into, connections=connections, options=options)
        say(f"round {number} of {options.rounds}")
    return seen


def _print(seen: Mapping[tuple[str, int], Seen]) -> None:
    rows = []
    for (way, connections), each in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0])):
        direct = seen[DIRECTLY, connections]
        rows.append(
            [
                f"{connections} connections, {way}",
                f"{median(each.rates):.0f}",
                times(median(each.rates) / median(direct.rates)),
                ms(median(each.on_the_way_s)),
                ms(percentile(each.on_the_way_s, 0.99)),
                ms(median(each.first_s)),
                f"{each.cpu_us:.1f}",
                f"{each.paced_cpu_us:.1f}",
            ]
        )
    head = [
        "one process each",
        "tokens/s",
        "of direct",
        "token p50 ms",
        "p99 ms",
        "first p50 ms",
        "CPU us/token",
        "paced",
    ]
    table('streams of a stand-in, at full speed and (from "token p50" on, with the last column) at a pace', head, rows)


def _bounds(seen: Mapping[tuple[str, int], Seen], connections: int) -> list[Bound]:
    def rate(way: str) -> float:
        return median(seen[way, connections].rates) if (way, connections) in seen else math.nan

    def added_s(way: str, what: str) -> float:
        return median(getattr(seen[way, connections], what)) - median(getattr(seen[DIRECTLY, connections], what))

    where = f"{connections} connections"
    least = _LEAST_OF_NGINX if connections > 1 else None
    most = _MOST_ADDED_S * 1e3 if connections == 1 else None
    return [
        Bound(what=f"{where}: tokens/s, flexpiped / nginx", value=rate(THROUGH) / rate(NGINX), limit=least),
        Bound(
            what=f"{where}: added to a token, p50",
            value=added_s(THROUGH, "on_the_way_s") * 1e3,
            limit=most,
            at_most=True,
            unit="ms",
        ),
        Bound(what=f"{where}: added to the first, p50", value=added_s(THROUGH, "first_s") * 1e3, limit=None, unit="ms"),
    ]


async def main() -> int:
    options = _options()
    async with _all_ways() as urls:
        seen = await _rounds(urls, options)
    _print(seen)
    bounds = [bound for connections in options.connections for bound in _bounds(seen, connections)]
    verdicts(bounds)
    write_json(options.json, {f"{way}, {count}": each.to_wire() for (way, count), each in seen.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
