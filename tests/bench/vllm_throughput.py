"""What flexpiped costs in front of vLLM: the same vLLM, set up alike, through flexpiped and directly, in turns.

One rank of two threads, eager, fp32, streams over HTTP with the same client: tokens per second, and the time from a
request to its first token (p99 over all requests of all rounds).
"""

import argparse
import asyncio
from pathlib import Path

from tests.bench.daemon_process import VLLM_BATCHED_TOKENS, daemon
from tests.bench.http_client import HttpClient, http_client
from tests.bench.program import checkpoint, parser, prompts, run, setup_of, whole_numbers
from tests.bench.stats import median, percentile
from tests.bench.tables import Bound, ms, say, table, times, verdicts, write_json
from tests.bench.vllm_server import vllm_server

THROUGH, DIRECTLY = "through flexpiped", "directly"
_BLOCK_TOKENS = 32  # as flexpiped's default
# vLLM's processes poll for a second after their last message: that of one way must not fall into the other's turn.
_SETTLE_S = 1.5


def _options() -> argparse.Namespace:
    made = parser("Compare vLLM through flexpiped with vLLM directly.")
    made.add_argument("--vllm-python", metavar="PATH", type=Path, required=True, help="interpreter that has vLLM")
    made.add_argument("--streams", type=whole_numbers, default=(1, 8, 32), help="numbers of streams")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--tokens", type=int, default=128, help="tokens of each stream")
    made.add_argument("--prompt-tokens", type=int, default=32, help="length of the prompts")
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


class Figures:
    """What was seen of one way."""

    def __init__(self) -> None:
        self.rates: dict[int, list[float]] = {}
        self.ttft_s: dict[int, list[float]] = {}

    async def turn(self, client: HttpClient, url: str, streams: int, seed: int, options: argparse.Namespace) -> None:
        given = prompts(count=streams, length=options.prompt_tokens, seed=seed)
        await asyncio.sleep(_SETTLE_S)
        load = await client.run(url, given, max_tokens=options.tokens)
        self.rates.setdefault(streams, []).append(load.tokens / (load.ended_s - load.started_s))
        self.ttft_s.setdefault(streams, []).extend(times_s[0] - load.started_s for times_s in load.times_s)


async def _rounds(client: HttpClient, urls: dict[str, str], options: argparse.Namespace) -> dict[str, Figures]:
    figures = {name: Figures() for name in urls}
    warm = {name: Figures() for name in urls}
    seed = 0
    for number in range(options.rounds + 1):
        for streams in options.streams:
            seed += 1
            for name in sorted(urls, reverse=number % 2 == 1):
                into = figures if number else warm
                await into[name].turn(client, urls[name], streams, seed, options)
        say(f"round {number} of {options.rounds}")
    return figures


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    python = options.vllm_python.absolute()  # not resolved: a virtual environment is found by its link
    setup = setup_of(options)
    flags = ["--block-size", str(_BLOCK_TOKENS), "--max-num-batched-tokens", str(VLLM_BATCHED_TOKENS)]
    async with (
        http_client() as client,
        daemon(model, setup, stages=1, vllm_python=python) as served,
        vllm_server(python, model, threads=setup.threads, eager=True, flags=flags) as url,
    ):
        figures = await _rounds(client, {THROUGH: served.url, DIRECTLY: url}, options)
    rows, bounds = [], []
    for streams in options.streams:
        rate = {name: median(seen.rates[streams]) for name, seen in figures.items()}
        late = {name: percentile(seen.ttft_s[streams], 0.99) for name, seen in figures.items()}
        ratio, wait = rate[THROUGH] / rate[DIRECTLY], late[THROUGH] / late[DIRECTLY]
        rows.append(
            [
                *(str(streams), f"{rate[THROUGH]:.0f}", f"{rate[DIRECTLY]:.0f}", times(ratio)),
                *(ms(late[THROUGH]), ms(late[DIRECTLY]), times(wait)),
            ]
        )
        limit = 0.95 if streams == max(options.streams) else None
        bounds.append(Bound(what=f"{streams} streams: tokens/s through flexpiped / directly", value=ratio, limit=limit))
        bounds.append(
            Bound(what=f"{streams} streams: p99 TTFT directly / through flexpiped", value=1 / wait, limit=limit)
        )
    head = ["streams", "tokens/s through", "directly", "ratio", "p99 TTFT ms through", "directly", "ratio"]
    table("vLLM, one rank of two threads, eager", head, rows)
    verdicts(bounds)
    write_json(options.json, {name: {"rates": f.rates, "ttft_s": f.ttft_s} for name, f in figures.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
