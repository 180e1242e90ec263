"""Every vLLM internal that flexpiped touches, and the check at start that each is as expected.

Those of compiled mode are in ``compiled_internals``; nothing outside the two imports from vllm. ``SUPPORTED`` are the
versions whose internals were read and tested: with another one vLLM is served as it is, and moves in place are refused
with the version in the message.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
import vllm
from flexpiped_served.signatures import parameters_of, takes
from vllm import SamplingParams
from vllm.exceptions import VLLMError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.worker.cpu_worker import CPUWorker as VllmCPUWorker
from vllm.v1.worker.gpu_worker import Worker as VllmGPUWorker

from flexpiped_vllm import compiled_internals

_missing = ""
try:  # what only moves in place need: a vLLM without it is served all the same
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group
    from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
    from vllm.model_executor.model_loader.utils import process_weights_after_loading
    from vllm.model_executor.models import utils as model_utils
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs
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
    "check",
    "check_connector",
    "create_scheduler_connector",
    "default_loading_by",
    "get_model_loader",
    "get_pp_group",
    "get_tp_group",
    "model_utils",
    "process_weights_after_loading",
    "safetensors_files",
    "set_current_vllm_config",
    "set_default_torch_dtype",
    "torch_threads",
]


def _expectations() -> list[tuple[str, bool]]:
    return [
        ("EngineCoreProc.run_busy_loop", callable(getattr(EngineCoreProc, "run_busy_loop", None))),
        (
            "EngineCoreProc._handle_client_request(request_type, request)",
            parameters_of(EngineCoreProc._handle_client_request) == ["self", "request_type", "request"],
        ),
        ("EngineCoreRequestType.WAKEUP", hasattr(EngineCoreRequestType, "WAKEUP")),
        (
            "MultiprocExecutor.collective_rpc(method, timeout, args, ...)",
            parameters_of(MultiprocExecutor.collective_rpc)[:4] == ["self", "method", "timeout", "args"],
        ),
        ("Scheduler.schedule", callable(getattr(Scheduler, "schedule", None))),
        (
            "Scheduler.update_from_output(scheduler_output, model_runner_output)",
            parameters_of(Scheduler.update_from_output)[:2] == ["self", "scheduler_output"],
        ),
        (
            "models.utils.make_layers(num_hidden_layers, layer_fn, prefix)",
            parameters_of(model_utils.make_layers) == ["num_hidden_layers", "layer_fn", "prefix"],
        ),
        ("models.utils.PPMissingLayer", isinstance(getattr(model_utils, "PPMissingLayer", None), type)),
        (
            "models.utils._model_to_pp_missing_layer_names",
            isinstance(getattr(model_utils, "_model_to_pp_missing_layer_names", None), dict),
        ),
        (
            "process_weights_after_loading(model, model_config, target_device)",
            parameters_of(process_weights_after_loading) == ["model", "model_config", "target_device"],
        ),
        (
            "DefaultModelLoader.load_weights(model, model_config)",
            takes(DefaultModelLoader.load_weights, "self", "model", "model_config"),
        ),
        *compiled_internals.expectations(),
    ]


def check() -> str:
    """Return why moves in place are refused with this vLLM, or nothing: each internal exists in the expected shape."""
    if VERSION.split("+")[0] not in SUPPORTED:
        return f"vLLM {VERSION} is not a version that moves in place were tested with ({', '.join(SUPPORTED)})"
    if missing := _missing or compiled_internals.missing:
        return f"vLLM {VERSION}: {missing}"
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
        if parameters_of(function) != parameters:
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
    if prepare is None or len(parameters_of(prepare)) != _PREPARE_PARAMETERS:
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
