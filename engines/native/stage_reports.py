"""What the daemon is told of the stages: each of their workers is asked, and where it is lost, the one in its place."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from engines.native import client_messages as c
from engines.native.engine_core import EngineCore
from engines.native.specs import specs_of
from engines.protocol import StageStatus

T = TypeVar("T")


async def stages_of(core: EngineCore, *, call: int) -> c.Stages:
    """Return what each stage is, holds and does."""
    stages, longest_slice_s = [], 0.0
    for number, (index, spec) in enumerate(specs_of(core.pipeline, core.worker_of).items()):
        stats = await _answered(core.inquiries.stats, index)
        longest_slice_s = max(longest_slice_s, stats.longest_slice_s)
        stages.append(
            StageStatus(
                index=number,
                device_ids=(core.boot.options.device_ids[index],),
                first_decoder=spec.first_decoder,
                end_decoder=spec.end_decoder,
                pids=(core.pool.pids[index],),
                weights_bytes=stats.weights_bytes,
                kv_mapped_bytes=stats.kv_mapped_bytes,
                busy=core.inquiries.busy_share(stats),
            )
        )
    return c.Stages(call=call, stages=tuple(stages), worker_pids=core.pool.pids, longest_slice_s=longest_slice_s)


async def steps_of(core: EngineCore, *, call: int) -> c.StageSteps:
    """Return what each stage has computed since it was asked last."""
    steps = [await _answered(core.inquiries.steps, worker) for worker in specs_of(core.pipeline, core.worker_of)]
    return c.StageSteps(
        call=call,
        tokens=[each.tokens for each in steps],
        sequences=[each.sequences for each in steps],
        context=[each.context for each in steps],
        busy_s=[each.busy_s for each in steps],
        parts_s=[each.parts_s for each in steps],
    )


async def _answered(ask: Callable[[int], asyncio.Future[T]], worker: int) -> T:
    """Ask until a worker has answered: who is told of the stages waits for that."""
    while True:
        answer = ask(worker)
        await asyncio.wait([answer])
        if not answer.cancelled():
            return answer.result()
