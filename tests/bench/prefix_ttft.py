"""Time to the first token of a prompt that the KV cache does not know, and of one that begins as one before it did.

In turns: a new prompt, then the same with another end, to the engine directly and then to a daemon over HTTP.
"""

import argparse
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.bench import direct
from tests.bench.load_messages import Load
from tests.bench.program import parser, prompts, run, whole_numbers
from tests.bench.rigs import both_ways
from tests.bench.stats import median, percentile
from tests.bench.tables import Bound, ms, say, table, times, verdicts, write_json

_OWN_TOKENS = 16  # of a prompt that begins as another: so many are its own
_MAX_TOKENS = 2
Complete = Callable[[Sequence[Sequence[int]]], Awaitable[Load]]


@dataclass(slots=True)
class Seen:
    """Times to the first token, in seconds."""

    cold_s: list[float] = field(default_factory=list)
    hit_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return median(self.cold_s) / median(self.hit_s)


def _options() -> argparse.Namespace:
    made = parser("Measure the time to the first token with and without a cached prefix.")
    made.add_argument("--lengths", type=whole_numbers, default=(256, 1024, 3072), help="prompts, in tokens")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--stages", type=int, default=2)
    options = made.parse_args()
    if options.short:
        options.lengths, options.rounds = (256,), 2
    return options


async def _ttft_s(complete: Complete, prompt: list[int]) -> float:
    load = await complete([prompt])
    return load.times_s[0][0] - load.started_s


async def _measured(ways: dict[str, Complete], options: argparse.Namespace) -> dict[tuple[str, int], Seen]:
    seen: dict[tuple[str, int], Seen] = {}
    for number in range(-1, options.rounds):  # the first warms up
        for length in options.lengths:
            [known, other] = prompts(count=2, length=length, seed=number * 10_000 + length)
            like = known[:-_OWN_TOKENS] + other[-_OWN_TOKENS:]
            for way, complete in ways.items():
                cold_s, hit_s = await _ttft_s(complete, known), await _ttft_s(complete, like)
                if number >= 0:
                    of = seen.setdefault((way, length), Seen())
                    of.cold_s.append(cold_s)
                    of.hit_s.append(hit_s)
        say(f"round {number + 1} of {options.rounds}")
    return seen


def _print(seen: dict[tuple[str, int], Seen]) -> None:
    rows = [
        [
            f"{length} tokens, {way}",
            ms(median(of.cold_s)),
            ms(percentile(of.cold_s, 0.99)),
            ms(median(of.hit_s)),
            ms(percentile(of.hit_s, 0.99)),
            times(of.ratio),
        ]
        for (way, length), of in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0]))
    ]
    head = ["ms to the first token", "new: p50", "p99", "known: p50", "p99", "new / known"]
    table(f"prompts whose last {_OWN_TOKENS} tokens are their own", head, rows)


async def main() -> int:
    options = _options()
    began_s = time.monotonic()
    async with both_ways(options) as (client, server, engine):
        say(f"all is up after {time.monotonic() - began_s:.1f} s")
        ways: dict[str, Complete] = {
            "direct": partial(direct.complete, engine, max_tokens=_MAX_TOKENS),
            "HTTP": partial(client.run, server.url, max_tokens=_MAX_TOKENS),
        }
        seen = await _measured(ways, options)
        counters = await engine.counters()
    _print(seen)
    hit, queried = counters.prefix_hit_tokens_total or 0, counters.prefix_queried_tokens_total or 1
    say(f"{hit / queried:.1%} of the tokens were found")
    bounds = [
        Bound(what=f"{length} tokens, {way}: time to the first token, new / known", value=of.ratio, limit=None)
        for (way, length), of in seen.items()
    ]
    verdicts(bounds)
    write_json(options.json, {f"{way}, {length}": _wire(of) for (way, length), of in seen.items()}, bounds)
    return 0


def _wire(of: Seen) -> dict[str, Any]:
    return {"cold_s": of.cold_s, "hit_s": of.hit_s}


if __name__ == "__main__":
    run(main)
