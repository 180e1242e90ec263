"""A daemon that is killed and started again: from the kill to the next token that a client gets which asks again.

With engines that outlive the daemon and are adopted, and with engines that die with it, in turns.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import aiohttp

from tests.bench.processes import descendants, leashed
from tests.bench.program import checkpoint, parser, run
from tests.bench.tables import say, table, write_json

_ASK_AGAIN_S = 0.02
_DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """One of them. ``again_s``: from the kill to the next token; ``first_s``: to the first one, of a first start."""

    survives: bool
    first_s: float
    again_s: float
    was_adopted: bool


def _options() -> argparse.Namespace:
    made = parser("Measure how long a client waits after the daemon was killed.")
    made.add_argument("--rounds", type=int, default=5, help="restarts of each kind")
    made.add_argument("--stages", type=int, default=2, help="stages of the pipeline")
    made.add_argument("--engine", choices=("native", "vllm", "sglang"), default="native", help="which engine")
    made.add_argument("--python", metavar="PATH", default="", help="interpreter that has vLLM or SGLang")
    options = made.parse_args()
    if options.short:
        options.rounds = 1
    return options


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _configuration(model: Path, options: argparse.Namespace, *, folder: Path, port: int, survives: bool) -> str:
    return f"""
engine = "{options.engine}"
model = "{model}"
served_model_name = "bench"
stages = {options.stages}
dtype = "float32"
http.port = {port}
admin.socket = "{folder / "admin.sock"}"
[engines]
survive_restart = {str(survives).lower()}
adopt_within_s = 60.0
[engines.{options.engine}]
python = "{options.python}"
threads = {options.threads}
nice = {options.nice}
"""


async def _next_token(port: int) -> None:
    """Ask until there is a token."""
    body = {"prompt": [16, 17, 18], "max_tokens": 1, "temperature": 0}
    async with asyncio.timeout(_DEADLINE_S), aiohttp.ClientSession() as http:
        while True:
            try:
                async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(_ASK_AGAIN_S)


async def _restart(model: Path, options: argparse.Namespace, *, survives: bool) -> Restart:
    port = _free_port()
    with TemporaryDirectory(prefix="flexpiped-bench-") as name:
        folder = Path(name)
        config, log = folder / "bench.toml", folder / "log"
        config.write_text(_configuration(model, options, folder=folder, port=port, survives=survives))
        command = [sys.executable, "-m", "flexpiped", "--config", str(config)]
        environment = {"STATE_DIRECTORY": str(folder / "state")}
        async with AsyncExitStack() as stack:
            began_s = time.monotonic()
            first = await stack.enter_async_context(leashed(command, environment=environment, folder=folder, log=log))
            await _next_token(port)
            first_s = time.monotonic() - began_s
            killed_s = time.monotonic()
            os.kill(descendants(first.pid)[0], signal.SIGKILL)
            second = await stack.enter_async_context(leashed(command, environment=environment, folder=folder, log=log))
            await _next_token(port)
            again_s = time.monotonic() - killed_s
            daemon, *_ = descendants(second.pid)
            os.kill(daemon, signal.SIGINT)  # which ends the engines, too
            await second.wait()
        return Restart(
            survives=survives, first_s=first_s, again_s=again_s, was_adopted="engine adopted" in log.read_text()
        )


async def main() -> int:
    """Run the program; return its exit code."""
    options = _options()
    model = checkpoint(options)
    found: list[Restart] = []
    for number in range(options.rounds):
        for survives in (True, False):
            one = await _restart(model, options, survives=survives)
            say(f"round {number + 1}: {'adopted' if one.was_adopted else 'started again'}, {one.again_s:.2f} s")
            found.append(one)
    rows = []
    for survives, what in ((True, "engine adopted"), (False, "engine started again")):
        mine = [each for each in found if each.survives is survives]
        again = [each.again_s for each in mine]
        rows.append([what, f"{median(again):.2f} s", f"{max(again):.2f} s", f"{sum(e.was_adopted for e in mine)}"])
    table("kill -9 of the daemon until a client has a token again", ["", "median", "longest", "adopted"], rows)
    if options.json:
        write_json(options.json, {"restarts": [asdict(each) for each in found]}, [])
    return 0 if all(each.was_adopted is each.survives for each in found) else 1


if __name__ == "__main__":
    run(main)
