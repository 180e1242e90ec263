"""What it costs to have something in front of an engine: tokens/s and time to first token of several ways, in turns."""

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench.http_client import HttpClient
from tests.bench.load_messages import Prompt
from tests.bench.program import prompts, whole_numbers
from tests.bench.stats import median, percentile
from tests.bench.tables import Bound, ms, say, table, times

THROUGH, DIRECTLY = "through flexpiped", "directly"
_LIMIT = 0.95
# Engines' processes poll for a while after their last message: that of one way must not fall into another's turn.
_SETTLE_S = 1.5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what every such benchmark can be told."""
    parser.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")


class Figures:
    """What was seen of one way."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}
        self.ttft_s: dict[int, list[float]] = {}

    async def turn(self, client: HttpClient, url: str, given: Sequence[Prompt], *, max_tokens: int) -> None:
        streams = len(given)
        await asyncio.sleep(_SETTLE_S)
        load = await client.run(url, given, max_tokens=max_tokens)
        self.rates.setdefault(streams, []).append(load.tokens / (load.ended_s - load.started_s))
        self.ttft_s.setdefault(streams, []).extend(times_s[0] - load.started_s for times_s in load.times_s)

    def to_wire(self) -> dict[str, Any]:
        """Return what was seen as JSON values."""
        return {"rates": self.rates, "ttft_s": self.ttft_s}


async def take_turns(
    client: HttpClient,
    urls: Mapping[str, str],
    options: argparse.Namespace,
    *,
    as_prompt: Callable[[list[int]], Prompt] = lambda ids: ids,
) -> dict[str, Figures]:
    """Let all ways take a turn at each number of streams in each round, each round in another order.

    One round more is held before the others and not counted. All ways of one turn get prompts of their own, so that
    no prefix cache behind two of them knows the second's. ``as_prompt`` makes of token ids what is sent.
    """
    figures = {name: Figures() for name in urls}
    warm = {name: Figures() for name in urls}
    names, seed = list(urls), 0
    for number in range(options.rounds + 1):
        shift = number % len(names)
        for streams in options.streams:
            for name in [*names[shift:], *names[:shift]]:
                seed += 1
                into = figures if number else warm
                ids = prompts(count=streams, length=options.prompt_tokens, seed=seed)
                await into[name].turn(client, urls[name], list(map(as_prompt, ids)), max_tokens=options.tokens)
        say(f"round {number} of {options.rounds}")
    return figures


def report(title: str, figures: Mapping[str, Figures], options: argparse.Namespace) -> list[Bound]:
    """Print the table, every way beside ``DIRECTLY``, and return the bounds of ``THROUGH``."""
    rows, bounds = [], []
    for streams in options.streams:
        rate = {name: median(seen.rates[streams]) for name, seen in figures.items()}
        late = {name: percentile(seen.ttft_s[streams], 0.99) for name, seen in figures.items()}
        for name in figures:
            ratios = [times(rate[name] / rate[DIRECTLY]), times(late[name] / late[DIRECTLY])]
            rows.append([f"{streams} streams, {name}", f"{rate[name]:.0f}", ratios[0], ms(late[name]), ratios[1]])
        limit = _LIMIT if streams == max(options.streams) else None
        wanted = (
            ("tokens/s through flexpiped / directly", rate[THROUGH] / rate[DIRECTLY]),
            ("p99 TTFT directly / through flexpiped", late[DIRECTLY] / late[THROUGH]),
        )
        bounds += [Bound(what=f"{streams} streams: {what}", value=value, limit=limit) for what, value in wanted]
    table(title, ["streams, way", "tokens/s", "of direct", "p99 TTFT ms", "of direct"], rows)
    return bounds
