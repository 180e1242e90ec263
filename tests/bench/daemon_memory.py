"""What the daemon itself takes: memory idle, with 1,000 open streams and after many requests; how late its loop is.

The demo model runs in the native engine, so that streams are real ones. Memory is PSS, by what the processes do: the
daemon's own, the text process beside it, and the engine's. Growth is of what no file backs: the rest of PSS changes
with who else runs the same programs.
"""

import argparse
import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.daemon_process import DaemonProcess, daemon
from tests.bench.http_client import HttpClient, http_client
from tests.bench.processes import ROOT, pss_bytes, unshared_bytes
from tests.bench.program import EngineSetup, parser, prompts, run
from tests.bench.tables import Bound, mib, say, table, verdicts, write_json
from tests.support.metrics import metrics_series

_SETTLE_S = 3.0
_PROMPT_TOKENS = 8
_MB = 1e6
_LAG = "flexpiped_event_loop_lag_seconds_bucket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """PSS at one moment, in bytes, and how much of it no file backs; ``lag_p99_s``: of the time before it, at most."""

    moment: str
    pss: Mapping[str, int]
    unshared: Mapping[str, int]
    lag_p99_s: float | None = None

    @property
    def own(self) -> int:
        """Of the daemon and its text process."""
        return self.pss["daemon"] + self.pss["text"]


def _options() -> argparse.Namespace:
    made = parser("Measure the daemon's own memory and how late its event loop is.")
    made.add_argument("--streams", type=int, default=1000, help="streams open at once")
    made.add_argument("--streams-s", type=float, default=60.0, help="how long they are watched")
    made.add_argument("--requests", type=int, default=100_000, help="requests of the soak")
    made.add_argument("--at-once", type=int, default=64, help="of them, one after the other on as many connections")
    made.add_argument("--tokens", type=int, default=2, help="tokens of each of them")
    options = made.parse_args()
    if options.short:
        options.streams, options.streams_s, options.requests = 50, 2.0, 500
    return options


def _more(options: argparse.Namespace) -> str:
    """Nobody waits for a place, so that every stream is one that gets tokens."""
    return f"""
max_num_seqs = {options.streams + options.at_once}
max_num_batched_tokens = 2048
[admission]
max_requests_in_flight = {options.streams + options.at_once}
"""


class Watch:
    """Reads memory, and the lag of the loop since it was last asked."""

    def __init__(self, server: DaemonProcess) -> None:
        self._server = server
        self._before: dict[float, float] = {}
        self.readings: list[Reading] = []

    async def read(self, moment: str) -> Reading:
        now = {float(labels["le"]): value for labels, value in await metrics_series(self._server.url, _LAG)}
        seen = {le: value - self._before.get(le, 0.0) for le, value in now.items()}
        self._before = now
        pids = self._server.pids()
        by_role = {"daemon": [pids.daemon], "text": pids.text, "core": pids.core, "workers": pids.workers}
        pss = await asyncio.to_thread(lambda: {role: pss_bytes(each) for role, each in by_role.items()})
        unshared = await asyncio.to_thread(lambda: {role: unshared_bytes(each) for role, each in by_role.items()})
        made = Reading(moment=moment, pss=pss, unshared=unshared, lag_p99_s=p99_at_most(seen))
        self.readings.append(made)
        say(f"{moment}: daemon {mib(pss['daemon'])} MiB, text {mib(pss['text'])} MiB")
        return made


def p99_at_most(counts: Mapping[float, float]) -> float | None:
    """Return the bound of a histogram that 99 % of its readings keep, None without readings."""
    total = counts.get(float("inf"), 0.0)
    return min(bound for bound, count in counts.items() if count >= 0.99 * total) if total else None


async def _open_streams(client: HttpClient, watch: Watch, url: str, options: argparse.Namespace) -> None:
    given = prompts(count=options.streams, length=_PROMPT_TOKENS, seed=1)
    fitting = [[16 + token % 1000 for token in prompt] for prompt in given]
    await client.hold(url, fitting, max_tokens=200, warm_events=1)
    await watch.read("all streams have begun")
    await asyncio.sleep(options.streams_s)
    load = await client.take()
    say(
        f"{sum(map(len, load.times_s))} events in {options.streams_s:g} s, {load.restarts} streams ended and began anew"
    )
    await watch.read(f"{options.streams} streams open")
    await client.stop()
    await asyncio.sleep(_SETTLE_S)
    await watch.read("streams ended")


async def _soak(client: HttpClient, url: str, options: argparse.Namespace, *, requests: int) -> None:
    given = prompts(count=options.at_once, length=_PROMPT_TOKENS, seed=2)
    fitting = [[16 + token % 1000 for token in prompt] for prompt in given]
    await client.hold(url, fitting, max_tokens=options.tokens, warm_events=1)
    ended = 0
    while (now := (await client.take()).restarts) < requests:
        if now - ended >= 10_000:
            ended = now
            say(f"{now} requests")
        await asyncio.sleep(0.5)
    await client.stop()
    await asyncio.sleep(_SETTLE_S)


async def _measure(options: argparse.Namespace) -> list[Reading]:
    setup = EngineSetup(threads=options.threads, nice=options.nice)
    async with (
        http_client() as client,
        daemon(ROOT / "etc" / "demo-model", setup, stages=2, more=_more(options)) as server,
    ):
        watch = Watch(server)
        await asyncio.sleep(_SETTLE_S)
        await watch.read("idle after the start")
        await _open_streams(client, watch, server.url, options)
        await _soak(client, server.url, options, requests=options.requests // 50)
        await watch.read(f"after {options.requests // 50} requests")
        await _soak(client, server.url, options, requests=options.requests)
        await watch.read(f"after {options.requests} more")
    return watch.readings


def _bounds(readings: list[Reading]) -> list[Bound]:
    idle, _, streams, _, before, after = readings
    return [
        Bound(what="daemon idle", value=idle.pss["daemon"] / _MB, limit=150.0, at_most=True, unit="MB"),
        Bound(what="daemon and text process idle", value=idle.own / _MB, limit=None, unit="MB"),
        Bound(what="daemon with open streams", value=streams.pss["daemon"] / _MB, limit=None, unit="MB"),
        *(
            Bound(
                what=f"{role}: growth over the soak",
                value=(after.unshared[role] / before.unshared[role] - 1) * 100,
                limit=5.0,
                at_most=True,
                unit="%",
            )
            for role in before.unshared
        ),
        *(
            Bound(what=f"p99 of the loop's lag, {what}, at most", value=reading.lag_p99_s * 1e3, limit=None, unit="ms")
            for what, reading in (("open streams", streams), ("soak", after))
            if reading.lag_p99_s is not None
        ),
    ]


async def main() -> int:
    options = _options()
    readings = await _measure(options)
    rows = [
        [
            reading.moment,
            *(mib(size) for size in reading.pss.values()),
            "-" if reading.lag_p99_s is None else f"{reading.lag_p99_s * 1e3:g}",
        ]
        for reading in readings
    ]
    table("memory (PSS in MiB) and lag of the event loop", ["", *readings[0].pss, "lag p99 ms, at most"], rows)
    bounds = _bounds(readings)
    verdicts(bounds)
    raw: dict[str, Any] = {
        "readings": [
            {"moment": r.moment, "pss": dict(r.pss), "unshared": dict(r.unshared), "lag_p99_s": r.lag_p99_s}
            for r in readings
        ]
    }
    write_json(options.json, raw, bounds)
    return 0


if __name__ == "__main__":
    run(main)
