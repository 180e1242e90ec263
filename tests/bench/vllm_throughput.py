"""What flexpiped costs in front of vLLM: the same vLLM, set up alike, through flexpiped and directly, in turns.

One rank, two threads by default, eager, fp32, streams over HTTP with the same client: tokens per second, and the time
from a request to its first token (p99 over all requests of all rounds).
"""

import argparse
import asyncio
from pathlib import Path

from tests.bench.daemon_process import BATCHED_TOKENS, daemon
from tests.bench.http_client import http_client
from tests.bench.in_front import DIRECTLY, THROUGH, add_options, report, take_turns
from tests.bench.program import checkpoint, parser, run, setup_of
from tests.bench.tables import verdicts, write_json
from tests.bench.vllm_server import vllm_server

_BLOCK_TOKENS = 32  # as flexpiped's default


def _options() -> argparse.Namespace:
    made = parser("Compare vLLM through flexpiped with vLLM directly.")
    made.add_argument("--vllm-python", metavar="PATH", type=Path, required=True, help="interpreter that has vLLM")
    add_options(made)
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    python = options.vllm_python.absolute()  # not resolved: a virtual environment is found by its link
    setup = setup_of(options)
    flags = ["--block-size", str(_BLOCK_TOKENS), "--max-num-batched-tokens", str(BATCHED_TOKENS)]
    async with (
        http_client() as client,
        daemon(model, setup, stages=1, engine="vllm", python=python) as served,
        vllm_server(python, model, threads=setup.threads, eager=True, flags=flags) as url,
    ):
        figures = await take_turns(client, {THROUGH: served.url, DIRECTLY: url}, options)
    bounds = report(f"vLLM, one rank, eager, threads: {setup.threads}", figures, options)
    verdicts(bounds)
    write_json(options.json, {name: seen.to_wire() for name, seen in figures.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
