"""Whole replica handovers of vLLM under streams: what do clients see of them, beside windows without one?

Two vLLMs that stay (two ranks and three) hand each other the streams, so that many handovers fit into one run: in turns
with KV caches that are carried ahead, carried one after the other, and computed again. Then one to a vLLM that is
started for it, with the first ending after it, as the daemon does it.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from engines.checkpoint import read_checkpoint
from engines.protocol import GenerationRequest, SamplingParams
from engines.vllm.adapter import VllmEngine
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import EngineFactory, Supervisor
from planner.handover import HandoverPhase
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from planner.model_graph import ModelGraph, build_model_graph
from tests.bench.direct import HeldStreams
from tests.bench.program import checkpoint, even, parser, prompts, run, setup_of
from tests.bench.replica_kv import Maker
from tests.bench.rigs import WARM, longest_output
from tests.bench.served_rig import post
from tests.bench.stats import largest_gap, largest_gap_of, median, slices
from tests.bench.tables import ms, say, table, times, write_json

_WINDOW_S: Final = 2.0  # at least, and as long as the longest handover so far
_WINDOW_LIMIT_S: Final = 8.0
_LOOP_POLL_S: Final = 0.005
_PLACES: Final = (even(2), even(3))


class KeptVllm(VllmEngine):
    """A vLLM that a supervisor may start and close again and again: it stays."""

    _runs = False

    async def start(self, *, on_progress: Callable[[str], None]) -> None:
        if not self._runs:
            await super().start(on_progress=on_progress)
            self._runs = True

    async def close(self) -> None:
        if not self._runs:  # it did not start
            await super().close()

    def release(self) -> None:
        """It ends when it is next closed."""
        self._runs = False


class OneByOne(KvCarrier):
    """A control: the KV cache of the next request is carried when its turn has come."""

    @property
    def can_look_ahead(self) -> bool:
        return False


WAYS: Final = {
    "copied, the next one ahead": (KvCarrier, KvPreference.COPY),
    "copied, one after the other": (OneByOne, KvPreference.COPY),
    "computed again": (KvCarrier, KvPreference.RECOMPUTE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One handover as its clients saw it, in seconds."""

    length_s: float  # until all requests were at the second
    gap_s: float  # the largest of a stream, median over streams
    worst_s: float  # of any stream
    calm_gap_s: float  # the same two in windows of that length without a handover
    calm_worst_s: float
    first_gap_s: float  # of the request that went first
    worst_at_s: float  # when the largest gap began, from the switch
    step_gap_s: float  # the second's largest between two steps
    loop_late_s: float  # the daemon's event loop at most

    def __str__(self) -> str:
        return (
            f"{ms(self.length_s)} ms, gap {ms(self.gap_s)} (calm {ms(self.calm_gap_s)}), "
            f"worst {ms(self.worst_s)} (calm {ms(self.calm_worst_s)}) at {ms(self.worst_at_s)}, "
            f"first {ms(self.first_gap_s)}, step {ms(self.step_gap_s)}, loop {ms(self.loop_late_s)}"
        )


@dataclass(slots=True)
class Loop:
    """How late this event loop was at most since it was last asked."""

    late_s: float = 0.0

    async def watch(self) -> None:
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(_LOOP_POLL_S)
            self.late_s = max(self.late_s, time.monotonic() - before_s - _LOOP_POLL_S)

    def take(self) -> float:
        late_s, self.late_s = self.late_s, 0.0
        return late_s


def _options() -> argparse.Namespace:
    made = parser("Measure whole replica handovers of vLLM under streams.")
    made.add_argument("--vllm-python", type=Path, required=True, help="interpreter of an environment that has vLLM")
    made.add_argument("--rounds", type=int, default=4, help="handovers of each kind")
    made.add_argument("--streams", type=int, default=8)
    made.add_argument("--prompt-tokens", type=int, default=512)
    made.add_argument("--no-boot", action="store_true", help="leave out the handover to a vLLM that is started for it")
    options = made.parse_args()
    if options.short:
        options.rounds, options.streams = 1, 2
    return options


class Stand:
    """Two vLLMs that stay, and a supervisor with one of them in force."""

    def __init__(self, options: argparse.Namespace, kept: dict[Pipeline, KeptVllm], graph: ModelGraph) -> None:
        self._options = options
        self._kept = kept
        self._bytes_per_token = graph.kv_bytes_per_token
        self._numbers = 0
        self._longest_s = _WINDOW_S
        self.supervisor = Supervisor(factory=lambda pipeline, _epoch: kept[pipeline], pipeline=_PLACES[0])
        self.loop = Loop()
        self.first_uses: list[FirstUse] = []

    async def hand_over(self, way: str, *, factory: EngineFactory | None = None, target: Pipeline) -> Seen:
        """Hand streams over to ``target`` between two undisturbed windows. They begin when it is ready."""
        made, preference = WAYS[way]
        carrier = made(kv_bytes_per_token=self._bytes_per_token, preference=preference)
        if factory is None:  # what it computed of these prompts before would not be computed again
            await post(self._kept[target], "/reset_prefix_cache")
        runner = ReplicaRunner(self.supervisor, target, factory=factory, carrier=carrier)
        streams, calm_s, switched_s, taken_s = HeldStreams([], max_tokens=1), 0.0, 0.0, 0.0
        async for report in runner.run():
            if report.message == "second instance: ready":
                streams, calm_s = await self._begin(), time.monotonic()
                await asyncio.sleep(self._longest_s)
                self.loop.take()
                switched_s = time.monotonic()
            elif report.phase is HandoverPhase.COMMITTING:
                taken_s = time.monotonic()
        ended_s, late_s = time.monotonic(), self.loop.take()
        steps = [end_s for end_s in (await self._engine().trace())["ends_s"] if end_s >= switched_s]
        length_s = ended_s - switched_s
        self._longest_s = min(_WINDOW_LIMIT_S, max(self._longest_s, length_s))
        await asyncio.sleep(self._longest_s)
        done_s, seen = time.monotonic(), streams.take()
        await streams.stop()
        calm = [*slices(calm_s, switched_s, length_s), *slices(ended_s, done_s, length_s)]
        gaps = [largest_gap(each, switched_s, ended_s) for each in seen]
        worst = seen[max(range(len(gaps)), key=gaps.__getitem__)]
        at_s = next((a for a, b in pairwise(worst) if b - a == max(gaps)), switched_s)
        return Seen(
            length_s=taken_s - switched_s,
            gap_s=median(gaps),
            worst_s=max(gaps),
            calm_gap_s=median(largest_gap(each, *window) for each in seen for window in calm),
            calm_worst_s=median(largest_gap_of(seen, *window) for window in calm),
            first_gap_s=gaps[0],
            worst_at_s=at_s - switched_s,
            step_gap_s=largest_gap(steps, switched_s, ended_s),
            loop_late_s=late_s,
        )

    def release_first(self) -> None:
        """Let the vLLM in force end when another has taken over."""
        for engine in self._kept.values():
            if engine is self.supervisor.engine:
                engine.release()

    async def _begin(self) -> HeldStreams:
        self._numbers += 1
        length, count = self._options.prompt_tokens, self._options.streams
        given = prompts(count=count, length=length, seed=1000 + self._numbers)
        streams = HeldStreams(given, max_tokens=longest_output(count, length))
        await streams.start(self.supervisor, warm_tokens=WARM)
        streams.take()
        return streams

    def _engine(self) -> VllmEngine:
        engine = self.supervisor.engine
        assert isinstance(engine, VllmEngine)
        return engine


@asynccontextmanager
async def _stand(options: argparse.Namespace, maker: Maker, graph: ModelGraph) -> AsyncIterator[Stand]:
    kept = {place: KeptVllm(maker.options(place), place, graph=graph) for place in _PLACES}
    stand = Stand(options, kept, graph)
    watching = asyncio.create_task(stand.loop.watch())
    try:
        await stand.supervisor.start()
        say("the first vLLM serves")
        await kept[_PLACES[1]].start(on_progress=lambda _message: None)
        say("the second vLLM serves")
        stand.first_uses = await _first_uses(kept[_PLACES[1]])
        yield stand
    finally:
        watching.cancel()
        await stand.supervisor.close()
        for engine in kept.values():
            engine.release()
            await engine.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstUse:
    """The largest wait for a token of requests of one kind at a vLLM that was just started, and of the same again."""

    kind: str
    first_s: float
    again_s: float


async def _first_uses(engine: VllmEngine) -> list[FirstUse]:
    """Measure what ``flexpiped.warming`` is for."""
    scored = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=True)
    kinds = {
        "greedy": [replace(scored, logprobs=False)],
        "with log-probabilities": [scored],
        "two of these together": [scored, scored],
        "one of these sampled": [scored, replace(scored, temperature=0.8, top_p=0.9, seed=1)],
    }
    found = []
    for number, (kind, together) in enumerate(kinds.items()):
        waits = [await _longest_wait(engine, together, seed=10 * number + turn) for turn in range(3)]
        found.append(FirstUse(kind=kind, first_s=waits[0], again_s=min(waits[1:])))
    return found


async def _longest_wait(engine: VllmEngine, together: list[SamplingParams], *, seed: int) -> float:
    given = prompts(count=len(together), length=64, seed=5000 + seed)
    began_s = time.monotonic()

    async def times_of(prompt: list[int], sampling: SamplingParams) -> list[float]:
        request = GenerationRequest(request_id=f"use-{prompt[:4]}", prompt_token_ids=tuple(prompt), sampling=sampling)
        return [began_s, *[time.monotonic() async for _ in engine.generate(request)]]

    seen = await asyncio.gather(*map(times_of, given, together))
    return largest_gap_of(seen, began_s, time.monotonic())


def _row(way: str, seen: list[Seen]) -> list[str]:
    gap, calm = median(s.gap_s for s in seen), median(s.calm_gap_s for s in seen)
    return [
        way,
        ms(median(s.length_s for s in seen)),
        ms(gap),
        times(median(s.gap_s / s.calm_gap_s for s in seen)),
        ms(median(s.worst_s for s in seen)),
        times(median(s.worst_s / s.calm_worst_s for s in seen)),
        ms(median(s.first_gap_s for s in seen)),
        ms(median(s.step_gap_s for s in seen)),
        ms(max(s.loop_late_s for s in seen)),
        ms(calm),
    ]


def _print(title: str, rows: list[list[str]]) -> None:
    head = ["way", "all over ms", "gap ms", "/ calm", "worst ms", "/ calm", "first ms", "step ms", "loop ms", "calm ms"]
    table(title, head, rows)


async def main() -> int:
    options = _options()
    model = await asyncio.to_thread(checkpoint, options)
    found = read_checkpoint(model)
    graph = build_model_graph(found.config, found.tensors, dtype="float32")
    maker = Maker(model, graph, setup_of(options), python=options.vllm_python)
    seen: dict[str, list[Seen]] = {way: [] for way in WAYS}
    started: list[Seen] = []
    async with _stand(options, maker, graph) as stand:
        uses = [[use.kind, ms(use.first_s), ms(use.again_s)] for use in stand.first_uses]
        table("longest wait for a token at a vLLM that was just started", ["requests", "first ms", "again ms"], uses)
        turn = 0
        for number in range(options.rounds + 1):  # the first round warms up
            for way in WAYS:
                turn += 1
                one = await stand.hand_over(way, target=_PLACES[turn % 2])
                say(f"{number} {way}: {one}")
                if number:
                    seen[way].append(one)
        title = f"handovers of {options.streams} streams of {options.prompt_tokens} tokens and more, medians"
        _print(title, [_row(way, seen[way]) for way in WAYS])
        if not options.no_boot:
            stand.release_first()
            started.append(await stand.hand_over(next(iter(WAYS)), factory=maker, target=_PLACES[turn % 2]))
            _print("one to a vLLM that was started for it", [_row("copied, the next one ahead", started)])
    raw: dict[str, Any] = {way: [_wire(each) for each in each_way] for way, each_way in seen.items()}
    raw["first_uses"] = [[use.kind, use.first_s, use.again_s] for use in stand.first_uses]
    write_json(options.json, raw | {"started": [_wire(each) for each in started]}, [])
    return 0


def _wire(seen: Seen) -> dict[str, float]:
    return {name: getattr(seen, name) for name in Seen.__dataclass_fields__}


if __name__ == "__main__":
    run(main)
