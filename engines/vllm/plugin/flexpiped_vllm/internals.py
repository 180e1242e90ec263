"""Every vLLM internal that flexpiped touches, and the check at start that each is as expected.

Nothing outside this module imports from vllm. ``SUPPORTED`` are the versions whose internals were read and tested: with
another one vLLM is served as it is, and moves in place are refused with the version in the message.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.exceptions import VLLMError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.worker.cpu_worker import CPUWorker as VllmCPUWorker
from vllm.v1.worker.gpu_worker import Worker as VllmGPUWorker

_missing = ""
try:  # what only moves in place need: a vLLM without it is served all the same
    from torch._dynamo.aot_compile import AOTCompiledFunction
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.compilation.decorators import _model_hash_key, _verify_source_unchanged
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper, reset_compile_wrapper
    from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models import utils as model_utils
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.workspace import unlock_workspace
except ImportError as error:
    _missing = str(error)

_missing_connector = ""
try:  # what only the handover of a request's KV cache needs
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1 as KVConnectorBase
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole, SupportsHMA
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
except ImportError as error:
    _missing_connector = str(error)

SUPPORTED = ("0.32.0",)
VERSION = vllm.__version__
_PREPARE_PARAMETERS = 5

__all__ = [
    "SUPPORTED",
    "VERSION",
    "AttentionSpec",
    "CUDAGraphWrapper",
    "CompilationMode",
    "EngineCore",
    "EngineCoreProc",
    "EngineCoreRequestType",
    "EngineDeadError",
    "EngineGenerateError",
    "FullAttentionSpec",
    "KVConnectorBase",
    "KVConnectorMetadata",
    "MLAAttentionSpec",
    "RequestOutputKind",
    "SamplingParams",
    "SupportsHMA",
    "UniformTypeKVCacheSpecs",
    "VLLMError",
    "VllmCPUWorker",
    "VllmGPUWorker",
    "artifact_path",
    "check",
    "check_connector",
    "choose_custom_ops",
    "create_scheduler_connector",
    "default_loading_by",
    "envs",
    "get_model_loader",
    "get_pp_group",
    "get_tp_group",
    "has_cuda_graphs",
    "is_compiled",
    "load_compiled",
    "model_utils",
    "process_weights_after_loading",
    "reset_compile_wrapper",
    "safetensors_files",
    "set_current_vllm_config",
    "set_default_torch_dtype",
    "torch_threads",
    "unlock_workspace",
]


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def _expectations() -> list[tuple[str, bool]]:
    return [
        ("EngineCoreProc.run_busy_loop", callable(getattr(EngineCoreProc, "run_busy_loop", None))),
        (
            "EngineCoreProc._handle_client_request(request_type, request)",
            _parameters(EngineCoreProc._handle_client_request) == ["self", "request_type", "request"],
        ),
        ("EngineCoreRequestType.WAKEUP", hasattr(EngineCoreRequestType, "WAKEUP")),
        (
            "MultiprocExecutor.collective_rpc(method, timeout, args, ...)",
            _parameters(MultiprocExecutor.collective_rpc)[:4] == ["self", "method", "timeout", "args"],
        ),
        ("Scheduler.schedule", callable(getattr(Scheduler, "schedule", None))),
        (
            "Scheduler.update_from_output(scheduler_output, model_runner_output)",
            _parameters(Scheduler.update_from_output)[:2] == ["self", "scheduler_output"],
        ),
        (
            "models.utils.make_layers(num_hidden_layers, layer_fn, prefix)",
            _parameters(model_utils.make_layers) == ["num_hidden_layers", "layer_fn", "prefix"],
        ),
        ("models.utils.PPMissingLayer", isinstance(getattr(model_utils, "PPMissingLayer", None), type)),
        (
            "models.utils._model_to_pp_missing_layer_names",
            isinstance(getattr(model_utils, "_model_to_pp_missing_layer_names", None), dict),
        ),
        (
            "process_weights_after_loading(model, model_config, target_device)",
            _parameters(process_weights_after_loading) == ["model", "model_config", "target_device"],
        ),
        (
            "DefaultModelLoader.load_weights(model, model_config)",
            _takes(DefaultModelLoader.load_weights, "self", "model", "model_config"),
        ),
        *_expectations_of_compiled_mode(),
    ]


def _expectations_of_compiled_mode() -> list[tuple[str, bool]]:
    runner, dispatch = GPUModelRunner, CustomOp.dispatch_forward
    return [
        ("compilation.caching.aot_compile_hash_factors(vllm_config)", _takes(aot_compile_hash_factors, "vllm_config")),
        ("compilation.decorators._model_hash_key(fn)", _takes(_model_hash_key, "fn")),
        (
            "compilation.decorators._verify_source_unchanged(source_info, vllm_config)",
            _takes(_verify_source_unchanged, "source_info", "vllm_config"),
        ),
        ("compilation.wrapper.reset_compile_wrapper(model)", _takes(reset_compile_wrapper, "model")),
        (
            "AOTCompiledFunction.disable_guard_check",
            callable(getattr(AOTCompiledFunction, "disable_guard_check", None)),
        ),
        ("torch.compiler.load_compiled_function", hasattr(torch.compiler, "load_compiled_function")),
        ("CustomOp.dispatch_forward(compile_native)", _takes(dispatch, "self", "compile_native")),
        ("GPUModelRunner._dummy_run(num_tokens, ...)", _parameters(runner._dummy_run)[:2] == ["self", "num_tokens"]),
        ("GPUModelRunner.capture_model", _takes(runner.capture_model, "self")),
        ("GPUModelRunner.preserve_serving_state", _takes(runner.preserve_serving_state, "self")),
        ("CUDAGraphWrapper.clear_all_graphs", hasattr(CUDAGraphWrapper, "clear_all_graphs")),
        (
            "CudagraphDispatcher.keys_initialized",
            "keys_initialized" in inspect.getsource(CudagraphDispatcher.dispatch),
        ),
    ]


def _takes(function: Any, *names: str) -> bool:
    return _parameters(function) == list(names)


def check() -> str:
    """Return why moves in place are refused with this vLLM, or nothing: each internal exists in the expected shape."""
    if VERSION.split("+")[0] not in SUPPORTED:
        return f"vLLM {VERSION} is not a version that moves in place were tested with ({', '.join(SUPPORTED)})"
    if _missing:
        return f"vLLM {VERSION}: {_missing}"
    for name, holds in _expectations():
        if not holds:
            return f"vLLM {VERSION}: {name} is not what it was when moves in place were tested"
    return ""


def check_connector() -> str:
    """Return why no KV cache can be handed over to or from this vLLM, or nothing."""
    if VERSION.split("+")[0] not in SUPPORTED:
        return f"vLLM {VERSION} is not a version that copies of KV were tested with ({', '.join(SUPPORTED)})"
    if _missing_connector:
        return f"vLLM {VERSION}: {_missing_connector}"
    expected = {
        KVConnectorBase.get_num_new_matched_tokens: ["self", "request", "num_computed_tokens"],
        KVConnectorBase.update_state_after_alloc: ["self", "request", "blocks", "num_external_tokens"],
        KVConnectorBase.build_connector_meta: ["self", "scheduler_output"],
    }
    for function, parameters in expected.items():
        if _parameters(function) != parameters:
            return f"vLLM {VERSION}: {function.__qualname__} is not what it was when copies of KV were tested"
    return ""


def create_scheduler_connector(config: Any, kv_cache_config: Any, *, name: str, module: str) -> Any:
    """Return a connector of class ``name`` in ``module`` for a ``VllmConfig`` that names none."""
    named = copy(config)
    named.kv_transfer_config = KVTransferConfig(
        kv_connector=name, kv_connector_module_path=module, kv_role="kv_consumer"
    )
    return KVConnectorFactory.create_connector(named, KVConnectorRole.SCHEDULER, kv_cache_config)


def safetensors_files(loader: Any, model_config: Any, model: Any) -> list[Path] | None:
    """Return the safetensors files that a loader would read, or None where it reads something else."""
    prepare = getattr(loader, "_prepare_weights", None)
    if prepare is None or len(_parameters(prepare)) != _PREPARE_PARAMETERS:
        return None
    if list(getattr(model, "secondary_weights", ())):
        return None
    _, files, is_safetensors, _ = prepare(
        model_config.model,
        None,
        model_config.revision,
        getattr(model, "fall_back_to_pt_during_load", True),
        getattr(model, "allow_patterns_overrides", None),
    )
    return [Path(file) for file in files] if is_safetensors else None


@contextmanager
def default_loading_by(around: Callable[[Any, Any, Any, Callable[[], None]], None]) -> Iterator[None]:
    """In this scope vLLM's loader of checkpoints calls ``around(loader, model, model_config, load)`` for its own."""
    original = DefaultModelLoader.load_weights

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        around(self, model, model_config, lambda: original(self, model, model_config))

    DefaultModelLoader.load_weights = load_weights
    try:
        yield
    finally:
        DefaultModelLoader.load_weights = original


def torch_threads(count: int) -> None:
    """Set the threads of this process; vLLM's CPU worker replaces ``torch.set_num_threads`` by a warning."""
    torch._C.set_num_threads(count)


# --- compiled mode ---


def has_cuda_graphs(config: Any) -> bool:
    """Return whether steps are captured. On the CPU they are not."""
    return config.compilation_config.cudagraph_mode not in (None, CUDAGraphMode.NONE)


def is_compiled(module: Any) -> bool:
    """Return whether vLLM compiles the forward pass of ``module``, rather than runs it eagerly."""
    return isinstance(module, TorchCompileWithNoGuardsWrapper) and not module.do_not_compile


@contextmanager
def _custom_ops_of(config: Any, *, eager: bool) -> Iterator[None]:
    chosen = config
    if eager:  # as ``--enforce-eager`` would have it
        chosen = copy(config)
        chosen.compilation_config = copy(config.compilation_config)
        chosen.compilation_config.mode, chosen.compilation_config.custom_ops = CompilationMode.NONE, ["all"]
        for name in ("enabled_custom_ops", "disabled_custom_ops"):  # it counts them there
            setattr(chosen.compilation_config, name, copy(getattr(config.compilation_config, name)))
    with set_current_vllm_config(chosen, check_compile=False):
        yield


def choose_custom_ops(module: torch.nn.Module, config: Any, *, eager: bool) -> None:
    """Have the custom operations in ``module`` run what vLLM runs in eager mode, or what it compiles.

    In compiled mode some are wrapped in a ``torch.compile`` of their own, which would begin to trace at the first
    eager step.
    """
    with _custom_ops_of(config, eager=eager):
        for op in module.modules():
            if isinstance(op, CustomOp):
                op._forward_method = op.dispatch_forward(compile_native=False)


def artifact_path(core: Any, config: Any) -> Path:
    """Return where vLLM's compile cache has the code of a forward pass, for this rank and these variables.

    ``VLLM_PP_LAYER_PARTITION`` is one of them: each layout has a place of its own. As ``support_torch_compile`` does.
    """
    factors = [*aot_compile_hash_factors(config), _model_hash_key(core.forward)]
    key = hashlib.sha256(str(factors).encode()).hexdigest()
    parallel = config.parallel_config
    root = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "torch_aot_compile" / key
    return root / f"rank_{parallel.rank}_{parallel.data_parallel_index}" / "model"


def load_compiled(path: Path, core: Any, config: Any) -> Any:
    """Return the compiled forward pass that lies at ``path``. Nothing is traced: it takes the weights at each call.

    Raises:
        RuntimeError: The sources that it was compiled from have changed.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path.parents[1] / "inductor_cache")  # as vLLM does, where kernels lie
    with set_current_vllm_config(config, check_compile=False), path.open("rb") as file:
        function = torch.compiler.load_compiled_function(file, f_globals=core.forward.__globals__)
    _verify_source_unchanged(function.source_info(), config)
    if not config.compilation_config.dynamic_shapes_config.evaluate_guards:
        function.disable_guard_check()
    return function
