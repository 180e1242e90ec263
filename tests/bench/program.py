"""What all programs have in common: options, checkpoint, layouts, prompts, and an end that leaves nothing behind."""

import argparse
import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop

from planner.layout import Pipeline, pipeline_of
from tests.support.checkpoints import bench_llama, make_llama
from tests.support.qwen_checkpoint import REAL_SHAPE, make_qwen

DEVICES: Final = tuple(f"cpu:{index}" for index in range(8))
NUM_DECODERS: Final = 8
VOCAB_SIZE: Final = 4096
MAX_CONTEXT: Final = 4096
_CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexpiped" / "test-models"


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every program has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--short", action="store_true", help="few repetitions: proves the program, gives no figures")
    made.add_argument("--json", metavar="FILE", type=Path, help="write the raw figures here")
    made.add_argument(
        "--checkpoint", metavar="DIR", type=Path, help="serve this model instead of the benchmarks' Llama"
    )
    made.add_argument("--threads", type=int, default=2, help="threads of all stages together")
    made.add_argument("--nice", type=int, default=10, help="niceness of the stage workers")
    return made


def add_engine_pythons(made: argparse.ArgumentParser) -> None:
    """Add options that name where the real engines are; one that is not named is left out."""
    made.add_argument("--vllm-python", metavar="PATH", type=Path, help="interpreter that has vLLM")
    made.add_argument("--sglang-python", metavar="PATH", type=Path, help="interpreter that has SGLang")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSetup:
    """How the native engine is set up, by a daemon too. With these defaults no request has to wait."""

    threads: int = 2
    nice: int = 10
    kv_cache_bytes: int = 1 << 30  # 65,536 tokens of the benchmarks' Llama
    kv_device_bytes: int = 0  # on each device with a stage, instead; 0: of one size, whatever the layout
    device_memory_bytes: int = 4 << 30
    max_micro_batches: int = 0
    threads_per_device: int = 0  # 0: a single stage has all threads
    devices: int = len(DEVICES)


def setup_of(options: argparse.Namespace) -> EngineSetup:
    """Return the set-up that the options ask for."""
    return EngineSetup(threads=options.threads, nice=options.nice)


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read a list such as ``1,8,32``."""
    return tuple(int(word) for word in text.split(","))


def checkpoint(options: argparse.Namespace) -> Path:
    """Return the directory of the model, which is made if it is not there."""
    return _given_or(options, lambda: bench_llama(_CACHE / "bench-llama"))


def qwen_checkpoint(options: argparse.Namespace) -> Path:
    """Return a directory of Qwen2.5-0.5B's shape with random weights in bfloat16, which is made if it is not there."""
    return _given_or(options, lambda: make_qwen(_CACHE / "qwen-0.5b", shape=REAL_SHAPE))


def uncached_checkpoint(options: argparse.Namespace) -> Path:
    """Return the directory of a Llama of 110 MB, which is made if it is not there: more than processors cache.

    The other one, of 34 MB, is about as large as a cache that tenants of the host share, and its decoding takes 15 %
    more or less from minute to minute. Models that people serve fit into no cache.
    """
    return _given_or(options, _uncached_llama)


def _uncached_llama() -> Path:
    return make_llama(
        _CACHE / "uncached-llama",
        num_layers=NUM_DECODERS,
        hidden_size=512,
        intermediate_size=1376,
        num_heads=8,
        num_kv_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=0.08,
    )


def wide_checkpoint(options: argparse.Namespace) -> Path:
    """Return a directory of TinyLlama-1.1B's shape, but for its vocabulary, which is made if it is not there.

    1.9 GB of random weights in bfloat16, nearly all of them in its 22 decoders.
    """
    return _given_or(options, _wide_llama)


def _wide_llama() -> Path:
    return make_llama(
        _CACHE / "wide-llama",
        num_layers=22,
        hidden_size=2048,
        intermediate_size=5632,
        num_heads=32,
        num_kv_heads=4,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        initializer_range=0.02,
        dtype="bfloat16",
    )


def _given_or(options: argparse.Namespace, made: Callable[[], Path]) -> Path:
    """Return the directory that --checkpoint names, else what ``made`` makes."""
    given: Path | None = options.checkpoint
    return (given or made()).resolve()


def even(stages: int, *, devices: tuple[str, ...] = DEVICES, num_decoders: int = NUM_DECODERS) -> Pipeline:
    """Return the pipeline of that many stages, with even cuts, on the first devices."""
    cuts = [round(num_decoders * i / stages) for i in range(1, stages)]
    return pipeline_of(device_ids=devices[:stages], cuts=cuts, num_decoders=num_decoders)


def prompts(*, count: int, length: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens, none special. Another seed gives others, so that no prefix cache knows them."""
    draw = random.Random(seed)
    return [[draw.randrange(16, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def _cancel_once(task: "asyncio.Task[Any]") -> None:
    if not task.cancelling():
        task.cancel()


def run(main: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run the program to its end and exit. SIGTERM and SIGINT end it as a fault would, scopes included."""

    async def guarded() -> int:  # cancelled once: a second signal must not break off what ends the processes
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, _cancel_once, task)
        return await main()

    try:
        sys.exit(uvloop.run(guarded()))
    except asyncio.CancelledError:
        sys.exit(130)
