"""The process that measures layer times: ``python -m engines.native.layer_timing`` with one ``TimingRequest`` on stdin.

It builds the engine as the core does, forks the engine's own stage workers, runs layout after layout and batch after
batch through them, and writes a line for each to stdout.
"""

import sys
from collections.abc import Sequence
from statistics import fmean

import torch

from engines.checkpoint import open_checkpoint
from engines.errors import EngineError, UnsupportedByEngine
from engines.native import timing_messages as t
from engines.native.boot import boot
from engines.native.options import NativeOptions
from engines.native.text_part import text_part
from engines.native.timing_plan import Limits, TimedLayout, timed_batches, timed_layouts
from engines.native.timing_rig import StageTimes, TimingRig
from engines.process import die_with_parent, usable_cores
from planner.errors import PlannerError
from planner.layer_costs import Batch
from planner.layout import Pipeline, pipeline_of
from planner.model_graph import build_model_graph

_DISTURBED = 10  # one step in so many may be


def main() -> int:
    """Measure, and return the exit status."""
    request = t.decode_request(sys.stdin.buffer.readline())
    die_with_parent(parent_pid=request.parent_pid)
    try:
        _measure(request)
    except (EngineError, PlannerError, OSError) as error:
        _say(t.TimingFailed(reason=str(error), unsupported=isinstance(error, UnsupportedByEngine | PlannerError)))
        return 1
    return 0


def _measure(request: t.TimingRequest) -> None:
    options = request.options
    cores = options.threads or usable_cores()
    booted = boot(options, _whole(options), epoch=0)
    layouts = timed_layouts(
        device_ids=options.device_ids,
        num_decoders=booted.graph.num_decoders,
        cores=cores,
        threads_per_device=options.threads_per_device,
    )
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=booted.limits.max_model_len,
        kv_blocks=booted.kv_blocks_of(booted.pipeline),
        kv_block_tokens=options.kv_block_tokens,
    )
    plan = [(layout, timed_batches(limits, in_flight=layout.in_flight)) for layout in layouts]
    rig = TimingRig(booted)
    rig.start()
    try:
        _say(
            t.TimingStarted(
                num_points=2 * sum(len(batches) for _, batches in plan),
                torch_version=str(torch.__version__),
                attention=booted.attention,
                cores=cores,
            )
        )
        _run(rig, plan, budget_s=request.budget_s)
    finally:
        rig.close()
    _say(t.TimingDone())


def _whole(options: NativeOptions) -> Pipeline:
    """Return the pipeline of one stage, with which the engine is described; it is not what is measured."""
    checkpoint = text_part(open_checkpoint(options.model_directory))
    graph = build_model_graph(checkpoint.config, checkpoint.tensors, dtype=options.dtype)
    return pipeline_of(device_ids=options.device_ids[:1], cuts=[], num_decoders=graph.num_decoders)


def _run(rig: TimingRig, plan: list[tuple[TimedLayout, tuple[Batch, ...]]], *, budget_s: float) -> None:
    done = 0
    held: TimedLayout | None = None
    for layout, batches in plan:
        if held is None or (held.pipeline, held.threads) != (layout.pipeline, layout.threads):
            rig.bring_to(layout)
        held = layout
        first = _Pass(rig, layout, budget_s=budget_s / 2)
        for batch in batches:
            first.measure(batch)
            done += 1
            _say(t.TimingPoint(done=done, what=_words(layout, batch), stages=()))
        second = _Pass(rig, layout, budget_s=budget_s / 2)
        for batch, before in zip(batches, first.means_s, strict=True):
            stages, means_s = second.measure(batch)
            done += 1
            # what disturbs a whole pass only adds: the smaller of two means, some time apart
            observed = tuple(
                _observed(layout, batch, stage, busy_s=min(pair))
                for stage, pair in zip(stages, zip(before, means_s, strict=True), strict=True)
            )
            _say(t.TimingPoint(done=done, what=_words(layout, batch), stages=observed))


class _Pass:
    """One measurement of each batch on a layout."""

    def __init__(self, rig: TimingRig, layout: TimedLayout, *, budget_s: float) -> None:
        self._rig = rig
        self._layout = layout
        self._budget_s = budget_s
        self.means_s: list[list[float]] = []  # by batch and stage

    def measure(self, batch: Batch) -> tuple[list[StageTimes], list[float]]:
        """Return what each stage took, and the means of that."""
        stages = self._rig.measure(batch, in_flight=self._layout.in_flight, budget_s=self._budget_s)
        self.means_s.append([_usual_mean_s(stage.busy_s) for stage in stages])
        return stages, self.means_s[-1]


def _usual_mean_s(busy_s: Sequence[float]) -> float:
    """Return the mean without the slowest tenth, in which something else ran.

    The mean, as queues feel all steps: half of them take longer than the median, and by more than the others gain.
    """
    kept = sorted(busy_s)[: max(1, len(busy_s) - len(busy_s) // _DISTURBED)]
    return fmean(kept)


def _observed(layout: TimedLayout, batch: Batch, stage: StageTimes, *, busy_s: float) -> t.StageObserved:
    return t.StageObserved(
        threads=layout.threads,
        beside_others=layout.in_flight > 1,
        num_decoders=stage.num_decoders,
        has_embedding=stage.is_first,
        has_head=stage.is_last,
        tokens=batch.tokens,
        sequences=batch.sequences,
        context_tokens=batch.context_tokens,
        busy_s=busy_s,
    )


def _words(layout: TimedLayout, batch: Batch) -> str:
    stages = layout.pipeline.granularity
    where = f"{stages} stage{'s' if stages > 1 else ''}{', side by side' if layout.in_flight > 1 else ''}"
    if batch.tokens == batch.sequences:
        each = int(batch.context_tokens) // batch.sequences
        return f"{where}: {batch.sequences} x 1 token of {each}"
    return f"{where}: {batch.tokens} tokens of a prompt of {int(batch.context_tokens)}"


def _say(report: t.TimingReport) -> None:
    sys.stdout.buffer.write(t.encode(report) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
