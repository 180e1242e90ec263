"""Replica handover of vLLM: is a request's KV cache copied or computed again, and what does its client see of it?

First one request at a time, of different lengths, from one vLLM to another (two ranks to three): the copy beside the
recompute. Then whole handovers under streams: all copied, all computed again, and as the daemon decides.
"""

import argparse
import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from engines.checkpoint import read_checkpoint
from engines.closing import closing
from engines.offers import KvParcel
from engines.protocol import GenerationRequest, SamplingParams
from engines.vllm.adapter import VllmEngine
from engines.vllm.options import VllmOptions
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph
from tests.bench.direct import HeldStreams
from tests.bench.program import DEVICES, EngineSetup, checkpoint, even, parser, prompts, run, setup_of, whole_numbers
from tests.bench.rigs import WARM, longest_output
from tests.bench.stats import largest_gap, median
from tests.bench.tables import mib, ms, say, table, times, write_json
from tests.bench.vllm_rig import options_for

_READ = 16  # tokens that a request has before it goes over
_WINDOW_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One request on its way: how long it was carried while it ran, and then without a token."""

    carried_s: float
    gap_s: float
    num_bytes: int = 0


def _options() -> argparse.Namespace:
    made = parser("Measure how requests go from one vLLM to another.")
    made.add_argument("--vllm-python", type=Path, required=True, help="interpreter of an environment that has vLLM")
    made.add_argument("--prompt-tokens", type=whole_numbers, default=(64, 512, 2000), help="lengths of single requests")
    made.add_argument("--times", type=int, default=10, help="passages of each kind and length")
    made.add_argument("--streams", type=int, default=8, help="streams under a whole handover")
    options = made.parse_args()
    if options.short:
        options.times, options.streams = 1, 2
    return options


class Maker:
    """Makes vLLMs with as many ranks as the pipeline has stages."""

    def __init__(self, model: Path, graph: ModelGraph, setup: EngineSetup, *, python: Path) -> None:
        self._options = options_for(model, graph, setup, python=python)
        self._graph = graph

    def options(self, pipeline: Pipeline) -> VllmOptions:
        return msgspec.structs.replace(self._options, device_ids=DEVICES[: pipeline.granularity])

    def __call__(self, pipeline: Pipeline, epoch: int) -> VllmEngine:
        return VllmEngine(self.options(pipeline), pipeline, epoch=epoch, graph=self._graph)


async def _passage(first: VllmEngine, second: VllmEngine, prompt: list[int], *, copies: bool) -> Passage:
    """Take one request over. Its client's gap is from the moment when it leaves the first."""
    request = GenerationRequest(
        request_id="passage",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=512, ignore_eos=True),
    )
    tokens: list[int] = []
    parcel: KvParcel | None = None
    began_s = left_s = time.monotonic()
    async with closing(first.generate(request)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            if len(tokens) >= _READ:
                began_s = time.monotonic()
                if copies:
                    parcel = await first.export_kv(request.request_id)
                    await second.accept_kv(parcel)
                left_s = time.monotonic()
                break
    async with closing(second.generate(replace(request, generated_token_ids=tuple(tokens), kv=parcel))) as chunks:
        async for _ in chunks:
            gap_s = time.monotonic() - left_s
            break
    if parcel is not None:
        await second.forget_kv(parcel)
        await first.forget_kv(parcel)
    return Passage(carried_s=left_s - began_s, gap_s=gap_s, num_bytes=parcel.num_bytes if parcel else 0)


async def _single(first: VllmEngine, second: VllmEngine, options: argparse.Namespace, raw: dict[str, Any]) -> None:
    rows = []
    for length in options.prompt_tokens:
        copied: list[Passage] = []
        again: list[Passage] = []
        for number in range(options.times + 1):  # the first of each warms up
            for kind, copies in ((copied, True), (again, False)):
                (prompt,) = prompts(count=1, length=length, seed=1000 * length + 2 * number + copies)
                kind.append(await _passage(first, second, prompt, copies=copies))
        carry, gap, other = (
            median(p.carried_s for p in copied[1:]),
            median(p.gap_s for p in copied[1:]),
            median(p.gap_s for p in again[1:]),
        )
        rows.append(
            [str(length), mib(copied[-1].num_bytes), ms(carry), ms(gap), ms(other), times(other / (carry + gap))]
        )
        raw[f"single_{length}"] = {"carry_s": carry, "copied_gap_s": gap, "recomputed_gap_s": other}
    head = ["prompt tokens", "KV MiB", "copy ms", "then gap ms", "recompute: gap ms", "recompute / copy and gap"]
    table(f"one request, medians of {options.times}", head, rows)


async def _whole(supervisor: Supervisor, options: argparse.Namespace, raw: dict[str, Any]) -> None:
    """Hand the engine over under streams again and again, to two and three ranks in turn."""
    rows = []
    for number, preference in enumerate((KvPreference.COPY, KvPreference.RECOMPUTE, KvPreference.AUTO)):
        given = prompts(count=options.streams, length=512, seed=77 + number)
        streams = HeldStreams(given, max_tokens=longest_output(options.streams, 512))
        runner = ReplicaRunner(
            supervisor,
            even(3 if supervisor.pipeline.granularity == 2 else 2),
            carrier=KvCarrier(kv_bytes_per_token=raw["kv_bytes_per_token"], preference=preference),
        )
        began_s, message, calm = 0.0, "", 0.0
        async for report in runner.run():
            message = report.message
            if message == "second instance: ready":
                await streams.start(supervisor, warm_tokens=WARM)
                calm_s = time.monotonic()
                await asyncio.sleep(_WINDOW_S)
                began_s = time.monotonic()
                calm = median(largest_gap(each, calm_s, began_s) for each in streams.take())
        ended_s = time.monotonic()
        gaps = [largest_gap(each, began_s, ended_s) for each in streams.take()]
        await streams.stop()
        row = [preference.value, ms(calm), ms(median(gaps)), ms(max(gaps)), message.partition("taken over: ")[2]]
        say(", ".join(row))
        rows.append(row)
        raw[f"handover_{preference.value}"] = {"calm_s": calm, "gaps_s": gaps, "message": message}
    head = ["handover.kv", "gap before ms", "gap in the handover ms", "largest ms", "how"]
    table(f"whole handovers under {options.streams} streams of 512 tokens and more, medians over streams", head, rows)


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    found = read_checkpoint(model)
    graph = build_model_graph(found.config, found.tensors, dtype="float32")
    raw: dict[str, Any] = {"kv_bytes_per_token": graph.kv_bytes_per_token}
    make = Maker(model, graph, setup_of(options), python=options.vllm_python)
    async with AsyncExitStack() as stack:
        supervisor = Supervisor(factory=make, pipeline=even(2))
        stack.push_async_callback(supervisor.close)
        await supervisor.start()
        say("the first vLLM serves")
        first = supervisor.engine
        assert isinstance(first, VllmEngine)
        second = make(even(3), 1)
        try:
            await second.start(on_progress=lambda _message: None)
            say("the second vLLM serves")
            await _single(first, second, options, raw)
        finally:
            await second.close()
        await _whole(supervisor, options, raw)
    write_json(options.json, raw, [])
    return 0


if __name__ == "__main__":
    run(main)
