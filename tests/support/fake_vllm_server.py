"""Stands in for vLLM's processes in tests of what the daemon does about them. Standard library only; no model.

API server -> engine core -> worker, as real processes that only sleep; the token channel is real. ``FAKE_VLLM`` says
what is wrong with it: ``refuse`` (ends at start with an error), ``silent`` (is never ready), ``stuck`` (answers calls,
but gives no token), ``deaf`` (does not even answer calls once it is ready), ``miserly`` (hands no KV cache over),
``compiles`` (says so at a request, and takes its time), ``lends`` (its KV cache, by NIXL),
``keeps`` (says that it lends, and does not).
"""

import asyncio
import json
import os
import subprocess
import sys
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

BEHAVIOUR = os.environ.get("FAKE_VLLM", "")
DIRECTORY = Path(os.environ.get("FLEXPIPED_VLLM_DIR", "."))
COMPILING_S = 2.0
WORKER = "import time; time.sleep(600)"
CORE = f"""
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-S", "-c", {WORKER!r}])
print(worker.pid, flush=True)
worker.wait()
time.sleep(5)  # vLLM's takes its time, too: whose death came first can be told
"""


def log(level: str, message: str) -> None:
    print(f"(APIServer pid={os.getpid()}) {level} 10-21 12:01:02 [fake.py:1] {message}", flush=True)


class Fake:
    def __init__(self) -> None:
        self.core = subprocess.Popen([sys.executable, "-S", "-c", CORE], stdout=subprocess.PIPE, text=True)
        assert self.core.stdout is not None
        self.worker_pid = int(self.core.stdout.readline())
        self.steps = 0
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: dict[str, Any]) -> None:
            writer.write(json.dumps(message).encode() + b"\n")

        send(
            {
                "op": "ready", "vllm_version": "0.32.0", "max_model_len": 64, "vocab_size": 100, "eos_token_ids": [1],
                "pids": {"api": os.getpid(), "core": self.core.pid, "workers": [self.worker_pid], "helpers": []},
                "pp_size": 1, "tp_size": 1, "refactor_refusal": "it is a fake", "num_kv_blocks": 9,
                "kv_block_tokens": 32, "kv_form": "of a fake", "kv_refusal": "",
                "kv_by_nixl": BEHAVIOUR in ("lends", "keeps"),
            }
        )  # fmt: skip
        while line := await reader.readline():
            message = json.loads(line)
            if BEHAVIOUR == "deaf":
                continue
            match message["op"]:
                case "generate" if message["sampling"].get("min_p", 0) > 1:
                    failed = {
                        "op": "failed",
                        "key": message["key"],
                        "message": "min_p is too high",
                        "parameter": "min_p",
                    }
                    send(failed)
                case "generate" if BEHAVIOUR != "stuck":
                    key, count = message["key"], message["sampling"]["max_tokens"]
                    self.tasks[key] = asyncio.create_task(self.stream(send, key, len(message["prompt"]), count))
                case "abort":
                    if task := self.tasks.pop(message["key"], None):
                        task.cancel()
                case "kv_lend" | "kv_borrow":
                    send({"op": "reply", "call": message["call"], **self.loan(message)})
                case "core":
                    send({"op": "reply", "call": message["call"], **self.answer(message["method"], message["args"])})

    def loan(self, message: dict[str, Any]) -> dict[str, Any]:
        if BEHAVIOUR == "keeps" or message.get("params", {}).get("remote") == "nobody":
            return {"error": "NIXL is not there"}
        if message["op"] == "kv_borrow":
            return {"result": {"cached_tokens": len(message["tokens"])}}
        return {"result": {"tokens": [10, 11, 2], "num_bytes": 48, "params": {"remote": message["name"]}}}

    async def stream(self, send: Any, key: int, known: int, count: int) -> None:
        if BEHAVIOUR == "compiles":
            log("INFO", "Compiling a graph")
            await asyncio.sleep(COMPILING_S)
        for i in range(count):
            await asyncio.sleep(0.001)
            self.steps += 1
            finish = "length" if i + 1 == count else None
            send({"op": "outputs", "items": [[key, [known + i], finish, [-0.5]]]})
        del self.tasks[key]

    def answer(self, method: str, args: list[Any]) -> dict[str, Any]:
        if not method.startswith("flexpiped_kv_"):
            return {"result": self.counters()}
        if BEHAVIOUR == "miserly":
            return {"error": "it keeps its KV cache"}
        if method != "flexpiped_kv_export":
            return {"result": {}}
        (Path(args[1]) / "layer.0").write_bytes(bytes(64))
        return {"result": {"num_tokens": 4, "num_bytes": 64}}

    def counters(self) -> dict[str, int]:
        names = ("kv_blocks_used", "prompt_tokens_total", "generated_tokens_total", "preemptions_total")
        fixed = {"running": len(self.tasks), "waiting": 0, "kv_blocks_capacity": 8, "kv_block_tokens": 32}
        return dict.fromkeys(names, 0) | fixed | {"steps_total": self.steps}


async def main() -> None:
    log("INFO", "Resolved architecture: Fake")
    if BEHAVIOUR == "refuse":
        log("ERROR", "ValueError: this model is not one of ours")
        sys.exit(3)
    left_behind = shared_memory.SharedMemory(create=True, size=4096)
    log("INFO", f"left behind: {left_behind.name}")
    fake = Fake()
    if BEHAVIOUR != "silent":
        await asyncio.start_unix_server(fake.serve, DIRECTORY / "engine.sock")
        log("INFO", "Supported tasks: ['generate']")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
