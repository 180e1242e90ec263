"""CUDA graphs of a rank whose layers change: released, and captured again between two steps. Not yet run on a GPU.

A graph replays kernels with the addresses that it saw when it was captured: of weights and KV caches of the old layers,
and it knows the old list of layers. Nothing would notice; the output would be wrong. The order of things here is that
of vLLM's ``distributed/elastic_ep/elastic_execute.py`` (``_release_cuda_graphs``, ``warm_and_capture``).
"""

import time
from typing import Any

import torch

from flexpiped_vllm import compiled_internals, internals
from flexpiped_vllm.compiled import COMPILED, EAGER, CompiledForward
from flexpiped_vllm.compiling import CompileFailed

_CAPTURED = "captured"


class GraphedForward(CompiledForward):
    """The forward pass on a GPU: compiled and captured until its layers change, then eager, then eager and captured.

    What lies between graphs is not compiled for the new layout: the helper is a fork, which must not touch a GPU, and
    another process would need a CUDA context and room for it. Graphs of whole decode steps need no compiled code, so
    those are captured again, where the mode has them.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._state = COMPILED
        self._capture_s = 0.0
        self._watch_capture()

    @property
    def state(self) -> str:
        return EAGER if self._state == EAGER else COMPILED

    def warm_eager(self) -> None:
        if compiled_internals.is_compiled(self._core):
            super().warm_eager()

    def compile(self, ticket: int, *, held: list[int], counts: list[int]) -> dict[str, Any]:  # noqa: ARG002
        """Return what capturing again will cost: what it took at start, for the same batch sizes."""
        if self.state == COMPILED or not held:
            return {}
        if not self._config.compilation_config.cudagraph_mode.has_full_cudagraphs():
            raise CompileFailed("on CUDA, code is not compiled for another layout")
        return {"artifact": "", "compile_s": 0.0, "load_s": self._capture_s}

    def fall_back(self) -> None:
        """Run eagerly and without graphs from the next step on."""
        torch.accelerator.synchronize()  # a step's tokens may still be on their way on a side stream
        self._release()
        super().fall_back()
        self._state = EAGER

    def _release(self) -> None:
        self._runner.cudagraph_dispatcher.keys_initialized = False  # it answers: no graph, no padding
        compiled_internals.CUDAGraphWrapper.clear_all_graphs()

    def load(self, held: list[int]) -> float:
        """Capture whole steps of the new layout. Requests keep their block tables; dummy runs write no KV."""
        if self.state == COMPILED or not held:
            return 0.0
        started_s = time.perf_counter()
        runner = self._runner
        runner.cudagraph_dispatcher.keys_initialized = True
        try:
            compiled_internals.unlock_workspace()  # capture_model locks it again
            with (
                internals.set_current_vllm_config(self._config, check_compile=False),
                runner.preserve_serving_state(),
                torch.inference_mode(),
            ):
                runner.capture_model()
            torch.accelerator.synchronize()
        except BaseException:
            self._release()  # else steps would look for graphs that are not there
            raise
        self._state = _CAPTURED
        return time.perf_counter() - started_s

    def use(self) -> None:
        """Nothing: the dispatcher finds the graphs."""

    def drop(self) -> None:
        """Another rank could not capture: graphs of one rank alone do no harm, since each rank pads for itself."""

    def _watch_capture(self) -> None:
        """Learn how long vLLM captures at start."""
        capture_model = self._runner.capture_model

        def timed() -> int:
            started_s = time.perf_counter()
            taken_bytes: int = capture_model()
            self._capture_s = time.perf_counter() - started_s
            return taken_bytes

        self._runner.capture_model = timed
