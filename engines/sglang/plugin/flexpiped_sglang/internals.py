"""Every SGLang internal that moves in place touch, and the check at start that each is as expected.

``SUPPORTED`` are the versions whose internals were read and tested: with another one SGLang is served as it is, and
moves in place are refused with the version in the message.
"""

import inspect
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.signatures import parameters_of
from sglang.srt.runtime_context import get_parallel
from sglang.version import __version__ as VERSION  # noqa: N812

_missing = ""
try:  # what only moves in place need: an SGLang without it is served all the same
    from sglang.srt.distributed.utils import get_pp_indices
    from sglang.srt.layers.utils import PPMissingLayer
    from sglang.srt.managers.schedule_batch import NextBatchPlan, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
    from sglang.srt.managers.scheduler_components.pool_stats_observer import PoolStats
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.model_loader.loader import DefaultModelLoader
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.runtime_context import get_exec, get_server_args
    from sglang.srt.utils import common as layer_maker
    from sglang.srt.utils.common import cpu_has_amx_support
except ImportError as error:
    _missing = str(error)

SUPPORTED = ("0.5.23",)
MAKE_LAYERS = "sglang.srt.utils.common.make_layers"

__all__ = [
    "SUPPORTED",
    "VERSION",
    "PPMissingLayer",
    "all_weights",
    "check",
    "get_parallel",
    "get_pp_indices",
    "hook_make_layers",
    "live_pages",
    "load_by",
    "no_batch",
    "process_weights",
    "refusal_of",
    "refusal_of_first_layers",
    "safetensors_files",
    "would_run",
]


def _in_order(function: Any, *words: str) -> bool:
    """Return whether a function is there, and has these one after the other."""
    if function is None:
        return False
    source = inspect.getsource(function)
    places = [source.find(word) for word in words]
    return places[0] >= 0 and places == sorted(places)


def _expectations() -> list[tuple[str, bool]]:
    return [
        ("Scheduler._poll_timeout_aborts()", parameters_of(Scheduler._poll_timeout_aborts) == ["self"]),
        (
            "Scheduler.process_input_requests(recv_reqs)",
            parameters_of(Scheduler.process_input_requests) == ["self", "recv_reqs"],
        ),
        (
            "Scheduler.get_next_batch_to_run(running_batch, last_batch)",
            parameters_of(Scheduler.get_next_batch_to_run) == ["self", "running_batch", "last_batch"],
        ),
        (
            "Scheduler.process_batch_result(batch, result)",
            parameters_of(Scheduler.process_batch_result) == ["self", "batch", "result"],
        ),
        (
            "Scheduler._add_request_to_queue(req, is_retracted)",
            parameters_of(Scheduler._add_request_to_queue) == ["self", "req", "is_retracted"],
        ),
        ("PoolStats.get_kv_token_stats()", parameters_of(PoolStats.get_kv_token_stats) == ["self"]),
        ("IdleSleeper.poller", _in_order(IdleSleeper.maybe_sleep, "self.poller.poll(")),
        ("Scheduler.run_batch(batch, ...)", parameters_of(Scheduler.run_batch)[:2] == ["self", "batch"]),
        (
            "Scheduler._pp_microbatches_drained()",
            parameters_of(Scheduler._pp_microbatches_drained) == ["self"],
        ),
        (
            "Scheduler._collect_inflight_batches()",
            parameters_of(Scheduler._collect_inflight_batches) == ["self"],
        ),
        (
            "Scheduler.event_loop_pp (batches of a slot, its requests, those sent on, the choice of what runs)",
            _in_order(
                getattr(Scheduler, "event_loop_pp", None),
                "self.running_batch = self.running_mbs[",
                "self.last_batch = self.last_mbs[",
                "self.ingest_requests(",
                "self._pp_send_pyobj_to_next_stage(",
                "self.get_next_batch_to_run(",
                "self.mbs[mb_id] = ",
            ),
        ),
        ("NextBatchPlan", set(NextBatchPlan.__struct_fields__) == {"batch_to_run", "running_batch"}),
        ("ScheduleBatch.out_cache_loc", "out_cache_loc" in inspect.getsource(ScheduleBatch)),
        (
            "make_layers(num_hidden_layers, layer_fn, pp_rank, pp_size, prefix, ...)",
            parameters_of(layer_maker.make_layers)[:5]
            == ["num_hidden_layers", "layer_fn", "pp_rank", "pp_size", "prefix"],
        ),
        (
            "DefaultModelLoader._prepare_weights(model_name_or_path, revision, fall_back_to_pt, ...)",
            parameters_of(DefaultModelLoader._prepare_weights)[:4]
            == ["self", "model_name_or_path", "revision", "fall_back_to_pt"],
        ),
        (
            "DefaultModelLoader.load_model(model_config, device_config)",
            parameters_of(DefaultModelLoader.load_model) == ["self", "model_config", "device_config"],
        ),
        (
            "DefaultModelLoader.load_weights_and_postprocess(model, weights, target_device)",
            parameters_of(DefaultModelLoader.load_weights_and_postprocess) == ["model", "weights", "target_device"],
        ),
        ("MHATokenToKVPool._init_data_ptrs_and_strides", hasattr(MHATokenToKVPool, "_init_data_ptrs_and_strides")),
        ("MHATokenToKVPool._build_kv_buffer_descs", hasattr(MHATokenToKVPool, "_build_kv_buffer_descs")),
        ("BaseTokenToKVPoolAllocator.free_pages", "free_pages" in inspect.getsource(BaseTokenToKVPoolAllocator)),
    ]


def check() -> str:
    """Return why layers cannot move in this SGLang, or nothing."""
    if VERSION not in SUPPORTED:
        return f"moves in place are tested with SGLang {', '.join(SUPPORTED)}; this is {VERSION}"
    if _missing:
        return f"SGLang {VERSION} lacks what moves in place need: {_missing}"
    wrong = [name for name, right in _expectations() if not right]
    return f"SGLang {VERSION} is not as expected: {', '.join(wrong)}" if wrong else ""


def refusal_of(scheduler: Any) -> str:
    """Return what of a scheduler's configuration moves in place do not support, in words, or nothing."""
    args, parallel = scheduler.server_args, get_parallel()
    runner = scheduler.tp_worker.model_runner
    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    features = [
        ("one pipeline rank (pp_size 1)", parallel.pp_size == 1),
        ("an asynchronous batch depth", bool(parallel.pp_async_batch_depth)),
        # It would drop the commands of a slot in which it takes no requests.
        ("scheduler_recv_interval above 1", scheduler.request_receiver.recv_skipper is not None),
        ("data parallel attention", parallel.attn_dp_size > 1),
        ("context parallelism", parallel.attn_cp_size > 1),
        ("expert parallelism", getattr(args, "ep_size", 1) > 1),
        ("speculative decoding", not scheduler.spec_algorithm.is_none()),
        (f"quantisation ({scheduler.model_config.quantization})", scheduler.model_config.quantization is not None),
        ("LoRA", bool(getattr(args, "enable_lora", False))),
        ("a hierarchical cache", bool(getattr(scheduler, "enable_hierarchical_cache", False))),
        ("disaggregation", scheduler.disaggregation_mode.name != "NULL"),
        ("multimodal models", bool(scheduler.model_config.is_multimodal)),
        ("torch.compile", bool(getattr(args, "enable_torch_compile", False))),
        ("CUDA graphs and GPUs", str(scheduler.device) != "cpu"),
        ("weights packed for AMX", str(scheduler.device) == "cpu" and cpu_has_amx_support()),
        (f"a KV cache of type {type(pool).__name__}", type(pool) is not MHATokenToKVPool),
        (
            f"KV slots from {type(allocator).__name__}",
            type(allocator) not in (TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator),
        ),
        ("a KV cache that is not one row per token", getattr(pool, "kv_cache_layout", "") != "nhd"),
        ("a quantised KV cache", bool(getattr(pool, "is_quantized_kv_cache", False))),
        (f"weights from {type(runner.loader).__name__}", not isinstance(runner.loader, DefaultModelLoader)),
    ]
    found = [name for name, present in features if present]
    return f"moves in place are not supported with {', '.join(found)}" if found else ""


def refusal_of_first_layers(model_config: Any) -> str:
    """Return what of a configuration is in the way of first layers from the memory of the host, or nothing."""
    args, parallel, offload = get_server_args(), get_parallel(), get_exec().offload
    features = [
        (f"quantisation ({model_config.quantization})", model_config.quantization is not None),
        ("multimodal models", bool(model_config.is_multimodal)),
        ("speculative decoding", bool(getattr(args, "speculative_algorithm", None))),
        ("data parallel attention", parallel.attn_dp_size > 1),
        ("context parallelism", parallel.attn_cp_size > 1),
        ("expert parallelism", getattr(args, "ep_size", 1) > 1),
        ("offloaded weights", offload.cpu_offload_gb > 0 or getattr(offload, "offload_group_size", 0) > 0),
        ("ROCm", torch.version.hip is not None),  # a kernel there watches the checkpoint go by
    ]
    found = [name for name, present in features if present]
    return f"they are not kept with {', '.join(found)}" if found else ""


def load_by(around: Any) -> None:
    """Have SGLang's loader of checkpoints call ``around(loader, model_config, model, load)`` for a model's weights."""
    original = DefaultModelLoader.load_model

    @wraps(original)
    def load_model(self: Any, *, model_config: Any, device_config: Any) -> Any:
        if type(self) is not DefaultModelLoader:
            return original(self, model_config=model_config, device_config=device_config)
        load = self.load_weights_and_postprocess

        def load_weights_and_postprocess(model: Any, weights: Any, target_device: Any) -> None:
            around(self, model_config, model, lambda: load(model, weights, target_device))

        self.load_weights_and_postprocess = load_weights_and_postprocess
        try:
            return original(self, model_config=model_config, device_config=device_config)
        finally:
            del self.load_weights_and_postprocess  # the class has its own

    DefaultModelLoader.load_model = load_model


def safetensors_files(loader: Any, model_config: Any, model: Any) -> list[Path] | None:
    """Return the safetensors files that a loader would read, or None where it reads something else."""
    if list(getattr(model, "secondary_weights", ())):
        return None
    fall_back = getattr(model, "fall_back_to_pt_during_load", True)
    _, files, is_safetensors = loader._prepare_weights(model_config.model_path, model_config.revision, fall_back)
    return [Path(file) for file in files] if is_safetensors else None


def all_weights(loader: Any, model_config: Any, model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return all tensors of a checkpoint."""
    found: Iterator[tuple[str, torch.Tensor]] = loader._get_all_weights(model_config, model)
    return found


def process_weights(layer: torch.nn.Module) -> None:
    """Do what SGLang's loader does when the weights of a layer are there."""
    for module in layer.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)


def no_batch(running_batch: Any) -> Any:
    """Return the plan of a slot in which nothing runs."""
    return NextBatchPlan(batch_to_run=None, running_batch=running_batch)


def would_run(scheduler: Any, running_batch: Any, last_batch: Any) -> bool:
    """Return whether a slot with these batches has something to run."""
    batches = (running_batch, last_batch)
    return bool(scheduler.waiting_queue) or any(batch is not None and not batch.is_empty() for batch in batches)


def live_pages(allocator: Any) -> torch.Tensor:
    """Return which pages belong to a request or to the radix cache, as booleans by page; page 0 is nobody's."""
    live = torch.ones(allocator.size // allocator.page_size + 1, dtype=torch.bool)
    live[0] = False
    waiting = allocator.free_group or ()
    for free in (allocator.free_pages, allocator.release_pages):
        if free is not None:
            live[free] = False
    for slots in waiting:
        live[slots // allocator.page_size] = False
    return live


def hook_make_layers(around: Any) -> None:
    """Have ``around(original, ...)`` called for SGLang's ``make_layers``."""
    HookRegistry.register(MAKE_LAYERS, around, HookType.AROUND)
