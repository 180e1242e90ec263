"""The vLLM internals of compiled mode and CUDA graphs; ``internals`` checks at start that each is as expected."""

import hashlib
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.signatures import parameters_of, takes

missing = ""  # why moves in place are refused, where there is one
try:
    from torch._dynamo.aot_compile import AOTCompiledFunction
    from vllm import envs
    from vllm.compilation.caching import aot_compile_hash_factors
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.compilation.decorators import _model_hash_key, _verify_source_unchanged
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper, reset_compile_wrapper
    from vllm.config import CompilationMode, CUDAGraphMode, set_current_vllm_config
    from vllm.model_executor.custom_op import CustomOp
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.workspace import unlock_workspace
except ImportError as error:
    missing = str(error)

__all__ = [
    "CUDAGraphWrapper",
    "CompilationMode",
    "artifact_path",
    "choose_custom_ops",
    "envs",
    "expectations",
    "has_cuda_graphs",
    "is_compiled",
    "load_compiled",
    "missing",
    "reset_compile_wrapper",
    "unlock_workspace",
]


def expectations() -> list[tuple[str, bool]]:
    """Return each that is touched, in words, and whether it is as expected. Only where ``missing`` is empty."""
    runner, dispatch = GPUModelRunner, CustomOp.dispatch_forward
    return [
        ("compilation.caching.aot_compile_hash_factors(vllm_config)", takes(aot_compile_hash_factors, "vllm_config")),
        ("compilation.decorators._model_hash_key(fn)", takes(_model_hash_key, "fn")),
        (
            "compilation.decorators._verify_source_unchanged(source_info, vllm_config)",
            takes(_verify_source_unchanged, "source_info", "vllm_config"),
        ),
        ("compilation.wrapper.reset_compile_wrapper(model)", takes(reset_compile_wrapper, "model")),
        (
            "AOTCompiledFunction.disable_guard_check",
            callable(getattr(AOTCompiledFunction, "disable_guard_check", None)),
        ),
        ("torch.compiler.load_compiled_function", hasattr(torch.compiler, "load_compiled_function")),
        ("CustomOp.dispatch_forward(compile_native)", takes(dispatch, "self", "compile_native")),
        ("GPUModelRunner._dummy_run(num_tokens, ...)", parameters_of(runner._dummy_run)[:2] == ["self", "num_tokens"]),
        ("GPUModelRunner.capture_model", takes(runner.capture_model, "self")),
        ("GPUModelRunner.preserve_serving_state", takes(runner.preserve_serving_state, "self")),
        ("CUDAGraphWrapper.clear_all_graphs", hasattr(CUDAGraphWrapper, "clear_all_graphs")),
        (
            "CudagraphDispatcher.keys_initialized",
            "keys_initialized" in inspect.getsource(CudagraphDispatcher.dispatch),
        ),
    ]


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
