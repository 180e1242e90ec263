"""Streams go on token-exactly when vLLM is replaced: by a second instance, and after a death. Greedy, in fp32."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from engines.errors import EngineDied
from engines.vllm.adapter import VllmEngine
from flexpiped.kv_carrier import KvCarrier
from flexpiped.replica_handover import ReplicaRunner
from flexpiped.supervisor import Supervisor
from planner.handover import HandoverPhase
from planner.kv_route import KvPreference
from planner.layout import Pipeline
from planner.replica_steps import ReplicaLimits
from tests.support.vllm import graph_of, layout, options_for, roomy_llama
from tests.vllm.copied import assert_copy_is_exact_and_needed
from tests.vllm.recovering import Streams
from tests.vllm.streams import move, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

STREAMS = 32
PATIENT = ReplicaLimits(pace_s=60.0)
TWO_RANKS, MOVED = layout(4), layout(2)  # the first instance has one


class Made:
    """Makes engines with as many ranks as the pipeline has stages, and remembers them."""

    def __init__(self) -> None:
        self.engines: list[VllmEngine] = []

    def __call__(self, pipeline: Pipeline, epoch: int) -> VllmEngine:
        options = options_for(roomy_llama(), ranks=pipeline.granularity, kv_cache_bytes=256 << 20)
        self.engines.append(VllmEngine(options, pipeline, epoch=epoch, graph=graph_of(roomy_llama())))
        return self.engines[-1]


def late_answers(logs: Sequence[Mapping[str, Any]]) -> int:
    """Return how many requests were computed again because a vLLM did not answer in time: a machine that is busy enough
    makes that happen to some. To no request but one may anything else have happened, and to most nothing at all."""
    taken_over = [each for each in logs if each["event"] == "request taken over"]
    reasons = [each["reason"] for each in taken_over if each["route"] == "recompute"]
    late = [reason for reason in reasons if "did not answer within" in reason]
    assert len(late) <= len(taken_over) // 2, reasons
    return len(late)


@pytest.mark.parametrize("count", [8, pytest.param(STREAMS, marks=pytest.mark.long)])
async def test_streams_survive_a_replica_handover_and_a_killed_core(count: int) -> None:
    """Their KV caches are copied, but for one whose copy fails; and layers move in the vLLM that took them in."""
    made = Made()
    supervisor = Supervisor(factory=made, pipeline=layout())
    await supervisor.start()
    try:
        moved, killed = Streams(supervisor, count=count), Streams(supervisor, count=count)
        carrier = KvCarrier(preference=KvPreference.COPY)
        message = ""
        with capture_logs() as logs:
            async for report in ReplicaRunner(supervisor, TWO_RANKS, carrier=carrier, limits=PATIENT).run():
                message = report.message
                if message == "second instance: ready":
                    await assert_copy_is_exact_and_needed(made.engines[0], made.engines[1])
                    await made.engines[1].arm_failpoint("worker.kv_open", "fail", rank=1)
                    await moved.begin()
        assert (supervisor.pipeline, len(made.engines)) == (TWO_RANKS, 2)
        again = 1 + late_answers(logs)
        taken = f"the second instance serves, {count} of {count} requests taken over"
        copied = rf"{count - again} KV copied \([0-9.]+ [KM]iB\), {again} computed again"
        assert re.fullmatch(rf"{taken}: {copied}", message), message
        assert (await move(made.engines[1], MOVED))[-1].phase is HandoverPhase.DONE
        await moved.gain(10)
        await moved.stop()

        await killed.begin()
        await made.engines[1].arm_failpoint("core.commit.last", "kill")  # all is copied, and no rank has switched
        with pytest.raises(EngineDied, match="engine core"):
            await move(made.engines[1], TWO_RANKS)
        await killed.gain(10)
        await killed.stop()
        assert supervisor.engine is made.engines[2]
        assert supervisor.pipeline == MOVED

        lengths = [max(len(one), len(other)) for one, other in zip(moved.tokens, killed.tokens, strict=True)]
        undisturbed = await run_streams(made.engines[2], count=count, lengths=lengths)
        moved.assert_begin_of(undisturbed)
        killed.assert_begin_of(undisturbed)
    finally:
        await supervisor.close()
