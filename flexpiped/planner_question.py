"""From settings to what the planner is asked: the part of the question that stays the same while the daemon runs."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, assert_never

from engines.process import usable_cores
from engines.sglang import pipelining as sglang_pipelining
from engines.sglang.options import num_kv_tokens_of
from engines.vllm import pipelining as vllm_pipelining
from engines.vllm.options import num_kv_blocks_of
from flexpiped.config_values import Auto
from flexpiped.costs import Costs, costs_of
from flexpiped.device_sharing import Held, topology_beside, topology_without
from flexpiped.hardware import host_topology
from flexpiped.kv_capacity import native_kv_size, served_kv_bytes
from flexpiped.profiles import ProfileStore, profile_folder
from flexpiped.settings import EngineKind, Settings
from planner.errors import InvalidProfile
from planner.kv_capacity import KvInAll, KvPerDevice
from planner.model_graph import ModelGraph
from planner.question import EngineLimits, Fragmentation, PlanQuestion
from planner.roofline import Roofline
from planner.workload import Slo, Workload
from topology.cluster import ClusterTopology
from topology.device import Device, DeviceKind
from topology.gpu_specs import DeviceSpec, spec_of
from topology.topology import HostTopology

# For a GPU of which nothing is known: about that of an A10. All that are unknown count as alike.
_GUESS: Final = DeviceSpec(
    name="unknown",
    memory_bandwidth_bytes_per_s=600e9,
    flops_per_s={"float32": 31e12, "bfloat16": 125e12},
    is_estimate=True,
)


def question_here(
    settings: Settings, graph: ModelGraph, *, held: Held | None = None, adapter_bytes: int = 0
) -> PlanQuestion:
    """Return the question for the devices that are here, as they are now, with the best times that are known. Blocks.

    Args:
        held: By other models of this daemon.
        adapter_bytes: What each device has of adapters of this one, wherever layers are.

    Raises:
        UnsupportedByEngine: GPUs are asked for, and there are none or the engine does not take them.
    """
    topology = topology_without(topology_beside(host_topology(settings), held or {}), adapter_bytes)
    costs = known_costs(settings, graph=graph, topology=topology)
    return question_of(settings, graph=graph, topology=topology, costs=costs)


def known_costs(settings: Settings, *, graph: ModelGraph, topology: HostTopology | ClusterTopology) -> Costs:
    """Return times from a profile, else a roofline; a guess for a GPU of which nothing is known."""
    folder = profile_folder(os.environ, home=Path.home())
    try:
        return costs_of(
            graph,
            topology.devices,
            engine=settings.engine.value,
            cores=_cores(settings),
            threads_per_device=_threads_per_device(settings),
            store=ProfileStore(folder=folder),
        )
    except InvalidProfile as error:  # no reason not to serve: the plan says what it rests on
        guessed = Roofline(
            dtype=graph.dtype, figures_of=lambda device: spec_of(device) or _GUESS, figures_named=f"a guess, as {error}"
        )
        return Costs(alone=guessed, beside=guessed, note=str(error))


def question_of(
    settings: Settings, *, graph: ModelGraph, topology: HostTopology | ClusterTopology, costs: Costs
) -> PlanQuestion:
    """Return the question that ``settings`` ask: which pipeline for their workload, on an engine of their kind."""
    planner = settings.planner
    return PlanQuestion(
        graph=graph,
        costs=costs.alone,
        costs_beside=costs.beside,
        topology=topology,
        engine=engine_limits(settings, graph=graph, devices=topology.devices),
        workload=workload_of(settings),
        slo=slo_of(settings),
        cores=_cores(settings) if all(d.kind is DeviceKind.CPU for d in topology.devices) else None,
        threads_per_device=_threads_per_device(settings),
        headroom=planner.headroom,
        nested_loss=planner.nested_loss,
        risk_s=planner.risk_s,
        fragmentation=Fragmentation(
            whole_device=planner.whole_device_points,
            whole_island=planner.whole_island_points,
            shared=planner.shared_device_points,
            shared_per_cv2=planner.shared_per_cv2,
            scaled_path=planner.scaled_path_points,
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


def slo_of(settings: Settings) -> Slo:
    """Return the targets of a request."""
    return Slo(ttft_s=settings.slo.ttft_s, tpot_s=settings.slo.tpot_s)


def engine_limits(settings: Settings, *, graph: ModelGraph, devices: Sequence[Device]) -> EngineLimits:
    """Return what the configured engine can carry out."""
    num_devices = len(devices)
    native, vllm, sglang = settings.engines.native, settings.engines.vllm, settings.engines.sglang
    match settings.engine:
        case EngineKind.NATIVE | EngineKind.FAKE:
            micro_batches, kv = native.max_micro_batches, native_kv_size(native)
            return EngineLimits(
                max_stages=num_devices,
                max_sequences=native.max_num_seqs,
                max_step_tokens=native.max_num_batched_tokens,
                micro_batches=_cores(settings) if micro_batches is Auto.AUTO else micro_batches,
                kv_tokens=kv.blocks(graph) * kv.block_tokens if isinstance(kv, KvInAll) else None,
                kv_per_device=kv if isinstance(kv, KvPerDevice) else None,
            )
        case EngineKind.VLLM:
            reason = vllm_pipelining.one_rank_reason(graph.model_type, args=vllm.args)
            return EngineLimits(
                max_stages=1 if reason else num_devices // vllm.tensor_parallel,
                stages_reason=reason,
                degrees=(vllm.tensor_parallel,),
                max_sequences=vllm.max_num_seqs,
                max_step_tokens=vllm.max_num_batched_tokens,
                kv_tokens=num_kv_blocks_of(
                    kv_cache_bytes=served_kv_bytes(vllm, devices),
                    block_bytes=max(1, graph.kv_bytes_per_token * vllm.kv_block_tokens),
                )
                * vllm.kv_block_tokens,
            )
        case EngineKind.SGLANG:
            reason = sglang_pipelining.one_rank_reason(graph.model_type, tied=graph.tied, args=sglang.args)
            return EngineLimits(
                max_stages=1 if reason else num_devices // sglang.tensor_parallel,
                stages_reason=reason,
                degrees=(sglang.tensor_parallel,),
                max_sequences=sglang.max_num_seqs,
                max_step_tokens=sglang.max_num_batched_tokens,
                kv_tokens=num_kv_tokens_of(
                    kv_cache_bytes=served_kv_bytes(sglang, devices),
                    bytes_per_token=max(1, graph.kv_bytes_per_token),
                    page_tokens=sglang.kv_block_tokens,
                ),
            )
        case _:
            assert_never(settings.engine)


def _cores(settings: Settings) -> int:
    """Return the threads that all stages together may use."""
    threads = settings.engines.native.threads
    if settings.engine is EngineKind.VLLM:
        threads = settings.engines.vllm.threads
    elif settings.engine is EngineKind.SGLANG:
        threads = settings.engines.sglang.threads
    return usable_cores() if threads is Auto.AUTO else threads


def _threads_per_device(settings: Settings) -> int:
    """Return the threads that a stage has at most; 0 where no such bound is set, or the engine knows none."""
    own = settings.engines.native.threads_per_device
    return 0 if settings.engine is not EngineKind.NATIVE or own is Auto.AUTO else own
