"""A question to the planner, of a model of eight equal decoders on equal devices, and its answer."""

import itertools
from dataclasses import replace

from planner.candidate_plan import CandidatePlan, Found, PlanAnswer
from planner.planning import plan, require_plan
from planner.question import EngineLimits, PlanQuestion
from planner.workload import Slo, Workload
from tests.support.costs import FlatCosts
from tests.support.graphs import weighted_graph
from topology.device import cpu_devices
from topology.topology import HostTopology
from topology.units import MIB

GRAPH = weighted_graph([MIB] * 8, embedding=MIB, head=MIB)  # a byte of KV cache per token and decoder


def host(count: int = 8, *, memory_bytes: int = 64 * MIB) -> HostTopology:
    return HostTopology(host_id="h", devices=cpu_devices(count=count, memory_bytes=memory_bytes, host_id="h"))


def question(**values: object) -> PlanQuestion:
    asked = PlanQuestion(
        graph=GRAPH,
        costs=FlatCosts(),
        topology=host(),
        engine=EngineLimits(max_stages=8, max_sequences=16, max_step_tokens=256, kv_tokens=4096),
        workload=Workload(rate_per_s=1.0, prompt_tokens_mean=64, output_tokens_mean=32),
        slo=Slo(ttft_s=2.0),
    )
    return replace(asked, **values)  # type: ignore[arg-type]


def answer(**values: object) -> PlanAnswer:
    return plan(question(**values), clock=itertools.repeat(0.0).__next__)


def chosen(**values: object) -> Found:
    return require_plan(answer(**values))


def by_stages(found: PlanAnswer) -> dict[int, CandidatePlan]:
    return {each.num_stages: each for each in found.candidates}
