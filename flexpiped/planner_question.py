"""From settings to what the planner is asked: the part of the question that stays the same while the daemon runs."""

import os
from typing import assert_never

from engines.vllm.options import num_kv_blocks_of
from flexpiped.config_values import Auto
from flexpiped.settings import EngineKind, Settings
from planner.layer_costs import LayerCosts
from planner.model_graph import ModelGraph
from planner.question import EngineLimits, Fragmentation, PlanQuestion
from planner.workload import Slo, Workload
from topology.cluster import ClusterTopology
from topology.device import DeviceKind
from topology.topology import HostTopology


def question_of(
    settings: Settings, *, graph: ModelGraph, topology: HostTopology | ClusterTopology, costs: LayerCosts
) -> PlanQuestion:
    """Return the question that ``settings`` ask: which pipeline for their workload, on an engine of their kind."""
    planner = settings.planner
    return PlanQuestion(
        graph=graph,
        costs=costs,
        topology=topology,
        engine=engine_limits(settings, graph=graph, num_devices=len(topology.devices)),
        workload=workload_of(settings),
        slo=Slo(ttft_s=settings.slo.ttft_s, tpot_s=settings.slo.tpot_s),
        cores=_cores(settings) if all(d.kind is DeviceKind.CPU for d in topology.devices) else None,
        headroom=planner.headroom,
        risk_s=planner.risk_s,
        fragmentation=Fragmentation(
            whole_device=planner.whole_device_points,
            whole_island=planner.whole_island_points,
            shared=planner.shared_device_points,
            shared_per_cv2=planner.shared_per_cv2,
        ),
        deadline_s=planner.deadline_s,
    )


def workload_of(settings: Settings) -> Workload:
    """Return the workload that is expected."""
    workload = settings.workload
    return Workload(
        rate_per_s=workload.rate_per_s,
        cv=workload.cv,
        prompt_tokens_mean=workload.prompt_tokens_mean,
        output_tokens_mean=workload.output_tokens_mean,
    )


def engine_limits(settings: Settings, *, graph: ModelGraph, num_devices: int) -> EngineLimits:
    """Return what the configured engine can carry out."""
    native, vllm = settings.engines.native, settings.engines.vllm
    match settings.engine:
        case EngineKind.NATIVE | EngineKind.FAKE:
            micro_batches = native.max_micro_batches
            block_bytes = graph.kv_bytes_per_token * native.kv_block_tokens
            return EngineLimits(
                max_stages=num_devices,
                max_sequences=native.max_num_seqs,
                max_step_tokens=native.max_num_batched_tokens,
                micro_batches=_cores(settings) if micro_batches is Auto.AUTO else micro_batches,
                kv_tokens=native.kv_cache_bytes // max(1, block_bytes) * native.kv_block_tokens,
            )
        case EngineKind.VLLM:
            return EngineLimits(
                max_stages=num_devices // vllm.tensor_parallel,
                degrees=(vllm.tensor_parallel,),
                max_sequences=vllm.max_num_seqs,
                max_step_tokens=vllm.max_num_batched_tokens,
                kv_tokens=num_kv_blocks_of(
                    kv_cache_bytes=vllm.kv_cache_bytes,
                    block_bytes=max(1, graph.kv_bytes_per_token * vllm.kv_block_tokens),
                )
                * vllm.kv_block_tokens,
            )
        case _:
            assert_never(settings.engine)


def _cores(settings: Settings) -> int:
    """Return the threads that all stages together may use."""
    threads = settings.engines.native.threads
    if settings.engine is EngineKind.VLLM:
        threads = settings.engines.vllm.threads
    return len(os.sched_getaffinity(0)) if threads is Auto.AUTO else threads
