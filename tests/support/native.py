"""Starting the native engine for tests: small checkpoints, made once per machine user and kept in a cache."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from engines.native.adapter import NativeEngine
from engines.native.options import NativeOptions
from engines.protocol import GenerationRequest, RefactorProgress, SamplingParams
from planner.handover import HandoverPhase
from planner.layout import Pipeline, pipeline_of
from tests.support import checkpoints

T = TypeVar("T")
DEVICES = tuple(f"cpu:{index}" for index in range(8))
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexpiped" / "test-models"


def llama() -> Path:
    """Return a Llama of 8 decoders and hidden size 64."""
    return checkpoints.make_llama(CACHE / "llama")


def gpt2() -> Path:
    """Return a GPT-2 of 6 decoders."""
    return checkpoints.make_gpt2(CACHE / "gpt2")


def options_for(directory: Path, **overrides: object) -> NativeOptions:
    """Return options that suit a small checkpoint: KV blocks are compared at every commit, and stages have one thread.

    Two threads wait for each other at each operation: on a busy machine for far longer than these take.
    """
    values: dict[str, object] = {
        "model_directory": str(directory),
        "device_ids": DEVICES,
        "device_memory_bytes": 1 << 30,
        "kv_cache_bytes": 16 << 20,
        "threads": 1,
        "verify_checksums": True,
        "nice": 0,
    }
    return NativeOptions(**(values | overrides))  # type: ignore[arg-type]


def layout(*cuts: int, num_decoders: int = 8, devices: tuple[str, ...] = DEVICES) -> Pipeline:
    """Return a pipeline with these cuts on the first devices."""
    return pipeline_of(device_ids=devices[: len(cuts) + 1], cuts=cuts, num_decoders=num_decoders)


def even(stages: int, num_decoders: int = 8) -> Pipeline:
    """Return the pipeline of that many stages with even cuts."""
    return layout(*(round(num_decoders * i / stages) for i in range(1, stages)), num_decoders=num_decoders)


@asynccontextmanager
async def running(directory: Path, pipeline: Pipeline, **overrides: object) -> AsyncIterator[NativeEngine]:
    """Start an engine and close it on the way out."""
    engine = NativeEngine(options_for(directory, **overrides), pipeline)
    await engine.start(on_progress=lambda _message: None)
    try:
        yield engine
    finally:
        await engine.close()


def request(
    prompt: tuple[int, ...], *, max_tokens: int, temperature: float = 0.0, seed: int = 0, **sampling: object
) -> GenerationRequest:
    """Return a request that runs to ``max_tokens`` and reports log-probabilities."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=True,
        logprobs=True,
        **sampling,  # type: ignore[arg-type]
    )
    return GenerationRequest(request_id="test", prompt_token_ids=prompt, sampling=params)


async def collect(engine: NativeEngine, wanted: GenerationRequest) -> tuple[list[int], list[float]]:
    """Return all tokens of a request and their log-probabilities."""
    tokens: list[int] = []
    logprobs: list[float] = []
    async for chunk in engine.generate(wanted):
        tokens += chunk.token_ids
        logprobs += chunk.logprobs
    return tokens, logprobs


async def move(engine: NativeEngine, target: Pipeline) -> RefactorProgress:
    """Refactor and return the last report."""
    last: RefactorProgress | None = None
    async for report in engine.refactor(target):
        last = report
    assert last is not None
    return last


async def moved_under(
    engine: NativeEngine,
    targets: Sequence[Pipeline],
    run: Callable[[], Awaitable[T]],
    *,
    check: Callable[[RefactorProgress], None] = lambda _last: None,
) -> list[T]:
    """Move from target to target while ``run`` runs streams again and again; return what each of its runs gave.

    So there are streams when moves commit, however fast the engine is: at one commit at least, which is asserted.
    ``check`` is given the last report of each move.
    """
    live: list[int] = []

    async def move_on() -> None:
        for target in targets:
            if target != engine.pipeline:
                reports = [report async for report in engine.refactor(target)]
                live.extend(report.requests_live for report in reports if report.phase is HandoverPhase.COMMITTING)
                check(reports[-1])

    moving = asyncio.create_task(move_on())
    try:
        results = [await run()]
        while not moving.done():
            results.append(await run())
    finally:
        await moving
    assert any(live) or not live, "no stream was there at any commit"
    return results
