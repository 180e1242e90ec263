"""What of vLLM's configuration is in the way of a move, of a copy of KV cache, or of first layers from host memory.

Each function returns the features in words, or nothing. They ask for names that ``internals`` has only where its checks
pass: call those first.
"""

from collections.abc import Iterable
from typing import Any

from flexpiped_vllm import compiled_internals, internals

_PULL_BY_NIXL = ("NixlConnector", "NixlPullConnector")
_Features = list[tuple[str, bool]]  # each with whether it is there


def of_moves(config: Any) -> str:
    """Return the feature of a ``VllmConfig`` that moves in place do not support, in words, or nothing."""
    parallel = config.parallel_config
    found = _present(
        [
            ("one pipeline rank (pipeline_parallel_size 1)", parallel.pipeline_parallel_size == 1),
            *_of_whole_layers(config),
            ("LoRA", config.lora_config is not None),
            ("data parallelism", parallel.data_parallel_size > 1),
            ("KV connectors", config.kv_transfer_config is not None),
            ("model runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)", bool(config.use_v2_model_runner)),
            ("asynchronous scheduling", bool(config.scheduler_config.async_scheduling)),
            *of_compiled_mode(config),
        ]
    )
    return f"moves in place are not supported with {found}" if found else ""


def of_first_layers(config: Any) -> str:
    """Return the feature of a ``VllmConfig`` that is in the way of first layers from host memory, or nothing."""
    offload = config.offload_config
    offloaded = bool(offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size)
    found = _present([*_of_whole_layers(config), ("offloaded weights", offloaded)])
    return f"they are not kept with {found}" if found else ""


def of_groups(config: Any) -> str:
    """Return why the KV cache of a ``KVCacheConfig`` cannot move layer by layer, or nothing."""
    groups = config.kv_cache_groups
    if not groups:
        return "moves in place are not supported without a KV cache (encoders)"
    if len(groups) != 1:
        return f"moves in place are not supported with {len(groups)} KV cache groups (hybrid attention)"
    spec = groups[0].kv_cache_spec
    if isinstance(spec, internals.UniformTypeKVCacheSpecs) or not isinstance(spec, internals.AttentionSpec):
        return f"moves in place are not supported with a KV cache of type {type(spec).__name__}"
    return ""


def of_kv_copy(scheduler: Any) -> str:
    """Return why the KV cache of this ``Scheduler``'s requests cannot be handed over, in words, or nothing."""
    config, groups = scheduler.vllm_config, scheduler.kv_cache_config.kv_cache_groups
    specs = [type(group.kv_cache_spec) for group in groups]
    copied = (internals.FullAttentionSpec, internals.MLAAttentionSpec)
    found = _present(
        [
            *of_connector(config),
            ("speculative decoding", config.speculative_config is not None),  # it writes what it may take back
            ("data parallelism", config.parallel_config.data_parallel_size > 1),
            ("context parallelism", _context_parallel(config.parallel_config)),
            ("KV caches that are cleared before use", bool(scheduler.needs_kv_cache_zeroing)),
            ("an encoder, which has none", not groups),
            (f"{len(groups)} KV cache groups", len(groups) > 1),
            *[(f"a KV cache of type {spec.__name__}", spec not in copied) for spec in specs[:1]],
        ]
    )
    return f"no KV cache is copied with {found}" if found else ""


def pulls_by_nixl(config: Any) -> bool:
    """Return whether a ``VllmConfig`` names vLLM's NIXL connector that reads from another vLLM."""
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.kv_connector in _PULL_BY_NIXL


def of_connector(config: Any) -> _Features:
    """What of a KV connector that the configuration names is in the way."""
    transfer = config.kv_transfer_config
    if not pulls_by_nixl(config):
        return [("a KV connector of its own (--kv-transfer-config)", transfer is not None)]
    ranks = config.parallel_config.pipeline_parallel_size
    return [
        (f"NIXL in one direction (kv_role {transfer.kv_role} is not kv_both)", transfer.kv_role != "kv_both"),
        ("NIXL without a prefix cache", not config.cache_config.enable_prefix_caching),
        (f"NIXL over {ranks} pipeline ranks", ranks > 1),
    ]


def of_compiled_mode(config: Any) -> _Features:
    """What of compiled mode and CUDA graphs is not supported. On the CPU vLLM traces once, for all batch sizes."""
    compilation, modes, envs = config.compilation_config, compiled_internals.CompilationMode, compiled_internals.envs
    graphs = compiled_internals.has_cuda_graphs(config)
    frozen = bool(compilation.inductor_compile_config.get("max_autotune"))
    compiled = compilation.mode not in (None, modes.NONE)
    known = compilation.mode in (modes.DYNAMO_TRACE_ONCE, modes.VLLM_COMPILE)
    saved = bool(envs.VLLM_USE_AOT_COMPILE) and not envs.VLLM_DISABLE_COMPILE_CACHE and compilation.backend != "eager"
    return [
        (f"compilation mode {compilation.mode}", compiled and not known),
        # What is compiled outside the worker reaches it through this cache.
        ("compiled mode without vLLM's compile cache (VLLM_USE_AOT_COMPILE)", compiled and not saved),
        ("max_autotune (it freezes weights into the code)", compiled and frozen),
        ("breakable CUDA graphs", graphs and bool(envs.VLLM_USE_BREAKABLE_CUDAGRAPH)),
        ("CUDA graphs of micro-batches", graphs and bool(config.parallel_config.use_ubatching)),
    ]


def _of_whole_layers(config: Any) -> _Features:
    """What makes a layer something else than its parameters in the checkpoint, or spreads it over several places."""
    model, parallel = config.model_config, config.parallel_config
    return [
        (f"quantisation ({model.quantization})", model.quantization is not None),
        ("multimodal models", bool(model.is_multimodal_model)),
        ("speculative decoding", config.speculative_config is not None),
        ("context parallelism", _context_parallel(parallel)),
        ("expert parallelism", bool(parallel.enable_expert_parallel)),
        ("attention-free and hybrid models", bool(model.is_attention_free or model.is_hybrid)),
    ]


def _context_parallel(parallel: Any) -> bool:
    sizes = ("prefill_context_parallel_size", "decode_context_parallel_size")
    return any(getattr(parallel, name, 1) > 1 for name in sizes)


def _present(features: Iterable[tuple[str, bool]]) -> str:
    return ", ".join(name for name, present in features if present)
