"""Runs steps through the native engine's own stage workers, one after the other, and reads how long each computed.

It stands where the engine core stands: same processes, messages, kernels, threads and niceness, but no requests. So it
measures what a stage takes in the engine.
"""

import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from engines.errors import EngineStartFailed
from engines.native import messages as m
from engines.native.boot import Boot
from engines.native.specs import specs_of
from engines.native.timing_plan import TimedLayout
from engines.native.workers import WorkerPool
from planner.layer_costs import Batch

R = TypeVar("R", bound=m.WorkerReport)
_SILENCE_S = 120.0
_TOKEN_BYTES = 4
# What core, daemon and text process compute for each step and each token while the stages run the next one (measured by
# tests/bench/daemon_share.py). It takes cores and caches from the stages, which would seem a tenth too fast without it.
_TELLING_STEP_S, _TELLING_TOKEN_S = 600e-6, 60e-6
_STEPS_AT_LEAST, _STEPS_AT_MOST = 4, 400


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """What one stage took for one batch, step by step."""

    num_decoders: int
    is_first: bool
    is_last: bool
    busy_s: tuple[float, ...]


class TimingRig:
    """One set of workers, brought from layout to layout. Nothing else may use them."""

    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._pool = WorkerPool(boot.context)
        self._worker_of = {device: index for index, device in enumerate(boot.options.device_ids)}
        self._specs: dict[int, m.StageSpec] = {}
        self._generation = 0
        self._step = 0
        self._random = np.random.default_rng(0)
        # In no order, as those of an engine are that has served for a while: neighbours are read faster.
        self._kv_blocks = self._random.permutation(np.arange(1, 1 + boot.kv_blocks_of(boot.pipeline), dtype=np.int32))

    def start(self) -> None:
        """Fork the workers. Before anything here has run torch on threads."""
        for index in range(self._pool.size):
            self._pool.spawn(index)

    def close(self) -> None:
        self._pool.end()

    def bring_to(self, layout: TimedLayout) -> None:
        """Have the workers hold this layout and nothing else, and its KV cache written once, so that it is mapped."""
        held = list(self._specs)
        self._generation += 1
        for index in held:
            self._pool.send(index, m.Adopt(generation=self._generation, spec=None, threads=1))
            self._pool.send(index, m.Release(handover=self._generation - 1))
        for _ in held:
            self._wait_for(m.Released)
        self._specs = specs_of(layout.pipeline, self._worker_of)
        for index, spec in self._specs.items():
            self._pool.send(index, m.Prepare(handover=self._generation, spec=spec))
        for _ in self._specs:
            self._wait_for(m.Prepared, lambda report: report.done)
        for index, spec in self._specs.items():
            self._pool.send(index, m.Adopt(generation=self._generation, spec=spec, threads=layout.threads))
        self._fill_kv()

    def measure(self, batch: Batch, *, in_flight: int, budget_s: float) -> list[StageTimes]:
        """Return for each stage what it took for steps of ``batch``, ``in_flight`` of them under way at any time."""
        messages = [self._message(batch, lane) for lane in range(in_flight)]
        first = self._run(messages, count=in_flight + 1)
        typical_s = max(sum(np.median(steps.busy_s) for steps in first), 1e-6)
        count = int(min(max(_STEPS_AT_LEAST, budget_s * in_flight / typical_s), _STEPS_AT_MOST))
        found = self._run(messages, count=count + in_flight)
        return [
            StageTimes(
                num_decoders=spec.end_decoder - spec.first_decoder,
                is_first=spec.is_first,
                is_last=spec.is_last,
                busy_s=tuple(steps.busy_s[in_flight:]),  # the first ones meet cold caches
            )
            for spec, steps in zip(self._specs.values(), found, strict=True)
        ]

    # --- inside ---

    def _run(self, messages: list[m.RunStep], *, count: int) -> list[m.Steps]:
        """Run ``count`` steps, the messages in turn, and return what the stages report of them."""
        self._stage_steps()  # forget what came before
        sent = min(count, len(messages))
        for message in messages[:sent]:
            self._dispatch(message)
        for _ in range(count):
            done = self._wait_for(m.StepDone)
            if sent < count:
                self._dispatch(messages[sent % len(messages)])
                sent += 1
            _tell(len(done.tokens) // _TOKEN_BYTES)
        return self._stage_steps()

    def _dispatch(self, message: m.RunStep) -> None:
        self._step += 1
        raw = m.encode(
            m.RunStep(
                step_id=self._step,
                generation=self._generation,
                rows=message.rows,
                starts=message.starts,
                counts=message.counts,
                tokens=message.tokens,
                sampled=message.sampled,
                draws=[],
                logprobs=False,
            )
        )
        for index in self._specs:
            self._pool.send_raw(index, raw)

    def _stage_steps(self) -> list[m.Steps]:
        for index in self._specs:
            self._pool.send(index, m.ReadSteps(ticket=0))
        reports = {report.worker: report for report in (self._wait_for(m.Steps) for _ in self._specs)}
        return [reports[index] for index in self._specs]

    def _message(self, batch: Batch, lane: int) -> m.RunStep:
        """Lay the sequences of ``batch`` out over KV blocks of their own; lanes share nothing."""
        each, context = batch.tokens // batch.sequences, int(batch.context_tokens) // batch.sequences
        size = self._boot.limits.kv_block_tokens
        blocks = -(-context // size)
        rows = np.arange(lane * batch.sequences, (lane + 1) * batch.sequences, dtype=np.int32)
        for row in rows:
            first = int(row) * blocks
            self._boot.context.shared.block_table[row, :blocks] = self._kv_blocks[first : first + blocks]
        return self._step_of(rows, start=context - each, count=each)

    def _step_of(self, rows: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]", *, start: int, count: int) -> m.RunStep:
        tokens = self._random.integers(0, self._boot.vocab_size, len(rows) * count, dtype=np.int32)
        return m.RunStep(
            step_id=0,
            generation=0,
            rows=rows.tobytes(),
            starts=np.full(len(rows), start, dtype=np.int32).tobytes(),
            counts=np.full(len(rows), count, dtype=np.int32).tobytes(),
            tokens=tokens.tobytes(),
            sampled=np.arange(len(rows), dtype=np.int32).tobytes(),
            draws=[],
            logprobs=False,
        )

    def _fill_kv(self) -> None:
        """Write every KV block by prompts of one step each: memory never written reads faster than it should."""
        size, table = self._boot.limits.kv_block_tokens, self._boot.context.shared.block_table
        piece = max(1, min(self._boot.limits.max_num_batched_tokens // size, table.shape[1]))
        for first in range(0, len(self._kv_blocks), piece):
            blocks = self._kv_blocks[first : first + piece]
            table[0, : len(blocks)] = blocks
            count = min(len(blocks) * size, self._boot.limits.max_model_len)
            self._dispatch(self._step_of(np.zeros(1, dtype=np.int32), start=0, count=count))
            self._wait_for(m.StepDone)

    def _wait_for(self, kind: type[R], wanted: Callable[[R], bool] = lambda _report: True) -> R:
        """Return the next report of this kind; others that come before it are of no interest.

        Raises:
            EngineStartFailed: A worker failed, ended, or says nothing.
        """
        inbox = self._boot.context.core_inbox
        waited_s = 0.0
        while True:
            if not select.select([inbox.fileno()], [], [], 1.0)[0]:
                waited_s += 1.0
                self._check_alive()
                if waited_s > _SILENCE_S:
                    raise EngineStartFailed(f"the stage workers have said nothing for {_SILENCE_S:.0f} s")
                continue
            report = m.decode_report(inbox.receive())
            if isinstance(report, m.Crashed | m.Failed):
                raise EngineStartFailed(f"stage worker {report.worker} failed: {report.reason}")
            if isinstance(report, kind) and wanted(report):
                return report

    def _check_alive(self) -> None:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            raise EngineStartFailed(f"a stage worker (pid {pid}) {how}")


def _tell(num_tokens: int) -> None:
    """Use the processor as long as telling so many tokens does."""
    until_s = time.perf_counter() + _TELLING_STEP_S + num_tokens * _TELLING_TOKEN_S
    while time.perf_counter() < until_s:
        pass
