"""Streams through 1, 2 and 4 ingress processes, and through the daemon alone: tokens/s, and CPU time of whom per token.

Two ways: events of an engine's own server (the stand-in of ``tests.bench.sse_backend``), which an ingress passes on
without the daemon; and tokens that the daemon sends, which an ingress makes text and events of. Where cores are too few
for client, stand-in, daemon and ingress processes together, more of them cannot be faster, and the program says so:
then CPU time per token tells how many of them one daemon could feed, each on a core of its own, and ``--share 0.1``
gives each ingress a tenth of a core, as if cores were that much slower for them and there were more.
"""

import argparse
import asyncio
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from engines.process import usable_cores
from tests.bench.cpu_share import NoShares, shares
from tests.bench.plain_server import plain_server
from tests.bench.processes import ROOT, command_of, cpu_s, descendants
from tests.bench.program import parser, run, whole_numbers
from tests.bench.proxy_streams import stream
from tests.bench.stats import median
from tests.bench.tables import Bound, say, table, verdicts, write_json

EVENTS, TOKENS = "events", "tokens"
# Whose process it is, by a word of its command line; the first that fits.
_WHO: Final = {
    "ingress": "flexpiped.ingress.process",
    "text": "engines.text.process",
    "daemon": "tests.bench.ingress_front",
    "stand-in": "tests.bench.sse_backend",
}
_SHOWN: Final = ("ingress", "text", "daemon", "stand-in", "client")
_MOST_IN_A_STREAM: Final = 2000


@dataclass(slots=True)
class Seen:
    """What was seen of one way through so many processes, over all rounds."""

    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    took_s: float = 0.0
    used_s: dict[str, float] = field(default_factory=dict)

    def us_per_token(self, who: str) -> float:
        """Return the CPU time of all processes of a kind per token."""
        return self.used_s.get(who, 0.0) / self.tokens * 1e6 if self.tokens else math.nan

    @property
    def cores_busy(self) -> float:
        return sum(self.used_s.values()) / self.took_s if self.took_s else math.nan

    def to_wire(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        cpu = {who: self.us_per_token(who) for who in _SHOWN}
        return {"tokens_per_s": self.rates, "cpu_us_per_token": cpu, "cores_busy": self.cores_busy}


def _options() -> argparse.Namespace:
    made = parser("Streaming through several ingress processes.")
    made.add_argument("--processes", type=whole_numbers, default=(0, 1, 2, 4), help="0: the daemon serves HTTP itself")
    made.add_argument("--connections", type=int, default=256)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--tokens", type=int, default=150_000, help="of all streams of a turn together")
    made.add_argument("--share", type=float, help="of a core, that each ingress has with its text process; needs root")
    options = made.parse_args()
    if options.short:
        options.processes, options.rounds, options.tokens = (0, 2), 1, 12_800
    return options


class _Stream(asyncio.Protocol):
    """A stream of which only the end matters."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._tail = (self._tail + data)[-64:]
        if b"data: [DONE]" in self._tail and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the stream broke off: {exc or self._tail!r}"))


async def _tokens(url: str, *, connections: int, tokens: int) -> float:
    """Have so many streams of the fake engine at once; return how long they took."""
    address = urlsplit(url)
    body = msgspec.json.encode({"prompt": [40], "max_tokens": tokens, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    loop, began_s = asyncio.get_running_loop(), time.monotonic()
    opened = await asyncio.gather(
        *(
            loop.create_connection(lambda: _Stream(head + body), address.hostname, address.port)
            for _ in range(connections)
        )
    )
    try:
        await asyncio.gather(*(each.done for _, each in opened))
        return time.monotonic() - began_s
    finally:
        for transport, _ in opened:
            transport.abort()


@asynccontextmanager
async def _stand_in() -> AsyncIterator[str]:
    """Start the stand-in; yield where it listens."""
    with TemporaryDirectory(prefix="flexpiped-bench-ingress-") as name:
        socket = str(Path(name) / "backend.sock")
        words = ["-m", "tests.bench.sse_backend", "--socket", socket]
        async with plain_server(Path(sys.executable), words, environment={"PYTHONPATH": str(ROOT)}):
            yield socket


@asynccontextmanager
async def _front(count: int, socket: str) -> AsyncIterator[str]:
    words = ["-m", "tests.bench.ingress_front", "--socket", socket, "--processes", str(count)]
    environment = {"PYTHONPATH": str(ROOT)}
    async with plain_server(Path(sys.executable), words, environment=environment, health="/healthz") as url:
        yield url


def _pids() -> dict[str, tuple[int, ...]]:
    """Return the processes of each kind; this one is the client."""
    found: dict[str, list[int]] = {"client": [os.getpid()]}
    for pid in descendants(os.getpid()):
        command = command_of(pid)
        who = next((who for who, word in _WHO.items() if word in command and "bench.leash" not in command), None)
        if who is not None:
            found.setdefault(who, []).append(pid)
    return {who: tuple(pids) for who, pids in found.items()}


def _held_back(share: float | None) -> AbstractContextManager[None]:
    """Return a scope in which each ingress has no more than this share of a core, with its text process."""
    if share is None:
        return nullcontext()
    return shares([[pid, *descendants(pid)] for pid in _pids().get("ingress", ())], share)


async def _turn(way: str, url: str, seen: Seen, options: argparse.Namespace) -> None:
    pids = _pids()
    before = {who: cpu_s(each) for who, each in pids.items()}
    tokens = min(options.tokens // options.connections, _MOST_IN_A_STREAM)
    if way == EVENTS:
        took_s = (await stream(url, connections=options.connections, tokens=tokens, pace_s=0.0)).took_s
    else:
        took_s = await _tokens(url, connections=options.connections, tokens=tokens)
    seen.tokens += tokens * options.connections
    seen.took_s += took_s
    seen.rates.append(tokens * options.connections / took_s)
    for who, each in pids.items():
        seen.used_s[who] = seen.used_s.get(who, 0.0) + cpu_s(each) - before[who]


async def _rounds(options: argparse.Namespace) -> dict[tuple[str, int], Seen]:
    seen: dict[tuple[str, int], Seen] = {}
    async with _stand_in() as socket:
        for number in range(options.rounds):
            shift = number % len(options.processes)
            for count in [*options.processes[shift:], *options.processes[:shift]]:
                async with _front(count, socket) as url:
                    with _held_back(options.share):
                        for way in (EVENTS, TOKENS):
                            await _turn(way, url, Seen(), options)  # warms up
                            await _turn(way, url, seen.setdefault((way, count), Seen()), options)
            say(f"round {number + 1} of {options.rounds}")
    return seen


def _print(seen: Mapping[tuple[str, int], Seen], *, share: float | None) -> None:
    rows = []
    for (way, count), each in sorted(seen.items()):
        through = {0: "the daemon alone", 1: "1 ingress process"}.get(count, f"{count} ingress processes")
        shares = [f"{each.us_per_token(who):.1f}" for who in _SHOWN]
        rows.append([f"{way}, {through}", f"{median(each.rates):.0f}", f"{each.cores_busy:.2f}", *shares])
    head = ["CPU us/token of", "tokens/s", "cores busy", *_SHOWN]
    held = "" if share is None else f", of one of them {share:.0%} for each ingress"
    table(f"streams through ingress processes, {usable_cores()} cores for everything{held}", head, rows)


def _bounds(seen: Mapping[tuple[str, int], Seen]) -> list[Bound]:
    bounds = []
    for (way, count), each in sorted(seen.items()):
        if (way, 1) in seen and count > 1:
            rate = median(each.rates) / median(seen[way, 1].rates)
            bounds.append(Bound(what=f"{way}: tokens/s of {count}, of 1", value=rate, limit=None))
        if count == 1:
            own = max(each.us_per_token("daemon"), 0.1)
            fed = each.us_per_token("ingress") / own
            bounds.append(Bound(what=f"{way}: CPU of an ingress / of the daemon", value=fed, limit=None))
    return bounds


async def main() -> int:
    options = _options()
    if options.share is not None:
        options.processes = tuple(count for count in options.processes if count)  # the daemon alone is not held back
    elif usable_cores() < max(options.processes) + 3:
        say(f"{usable_cores()} cores: too few for client, stand-in, daemon and {max(options.processes)} processes")
    try:
        seen = await _rounds(options)
    except NoShares as error:
        say(f"--share: {error}")
        return 1
    _print(seen, share=options.share)
    bounds = _bounds(seen)
    verdicts(bounds)
    write_json(options.json, {f"{way}, {count}": each.to_wire() for (way, count), each in seen.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
