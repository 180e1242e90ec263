"""What flexpiped and sglang-router cost in front of SGLang: the same SGLang, set up alike, three ways in turns.

One rank, two threads by default, fp32, streams over HTTP with the same client: tokens per second, and the time from a
request to its first token (p99 over all requests of all rounds). The router stands in front of the SGLang that is asked
directly. It takes no token ids as prompts, so all ways get text.
"""

import argparse
import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from tests.bench.daemon_process import BATCHED_TOKENS, daemon
from tests.bench.http_client import http_client
from tests.bench.in_front import DIRECTLY, THROUGH, add_options, report, take_turns
from tests.bench.program import checkpoint, parser, run, setup_of
from tests.bench.sglang_server import sglang_router, sglang_server
from tests.bench.tables import say, verdicts, write_json

ROUTER = "through sglang-router"


def _options() -> argparse.Namespace:
    made = parser("Compare SGLang through flexpiped and through sglang-router with SGLang directly.")
    made.add_argument("--sglang-python", metavar="PATH", type=Path, required=True, help="interpreter that has SGLang")
    made.add_argument("--router-python", metavar="PATH", type=Path, help="interpreter that has sglang-router 0.3.2")
    add_options(made)
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


def _tokenizer(model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(model / "tokenizer.json"))


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    python = options.sglang_python.absolute()  # not resolved: a virtual environment is found by its link
    setup = setup_of(options)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http_client())
        served = await stack.enter_async_context(daemon(model, setup, stages=1, engine="sglang", python=python))
        url = await stack.enter_async_context(sglang_server(python, model, setup, batched_tokens=BATCHED_TOKENS))
        urls = {THROUGH: served.url, DIRECTLY: url}
        if options.router_python is None:
            say("sglang-router is left out: --router-python PATH names the interpreter of its environment")
        else:
            urls[ROUTER] = await stack.enter_async_context(sglang_router(options.router_python.absolute(), url))
        figures = await take_turns(client, urls, options, as_prompt=_tokenizer(model).decode)
    bounds = report(f"SGLang, one rank, threads: {setup.threads}", figures, options)
    verdicts(bounds)
    write_json(options.json, {name: seen.to_wire() for name, seen in figures.items()}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
