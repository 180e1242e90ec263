"""The compiled forward pass of one worker: given up for eager mode when its layers change, and had back later.

    COMPILED --fall_back--> EAGER --compile (helper)--> EAGER, code in the cache --load, use--> COMPILED

vLLM's compiled code is of one list of layers: with another it would still run the old ones. It takes the weights from
the modules at each call, so it does not matter which weights they have.
"""

import threading
import time
from pathlib import Path
from typing import Any

from flexpiped_served.failpoints import Failpoints

from flexpiped_vllm import compiled_internals
from flexpiped_vllm.compiling import CompileFailed, CompileHelper, CompileJob

COMPILED, EAGER = "compiled", "eager"
_SLOW_S = 3600.0  # of an armed failpoint


class CompiledForward:
    """Falls back, loads and switches in the worker's main thread; ``compile`` and ``stop`` run beside the steps.

    Args:
        core: The module whose forward runs the layers.
    """

    def __init__(self, runner: Any, core: Any, config: Any, failpoints: Failpoints) -> None:
        self._runner = runner
        self._core = core
        self._config = config
        self._failpoints = failpoints
        self._helper: CompileHelper | None = None
        self._lock = threading.Lock()  # over the next three: a job that was stopped must not leave anything
        self._wanted = 0  # number of the compilation that may bring an artifact
        self._job: CompileJob | None = None
        self._artifact: Path | None = None  # of the layout in force
        self._loaded: Any = None  # not in use yet

    @property
    def state(self) -> str:
        return EAGER if self._core.do_not_compile else COMPILED

    @property
    def helper_pid(self) -> int:
        return 0 if self._helper is None else self._helper.pid

    @property
    def job_pid(self) -> int:
        """The process that compiles now, 0 for none."""
        job = self._job
        return 0 if job is None else job.pid

    # --- at start ---

    def warm_eager(self) -> None:
        """Run the forward pass eagerly once, before requests are served: what is traced or built at first use is then
        built already, and the first step after a fallback takes no longer than the next."""
        compiled_internals.choose_custom_ops(self._core, self._config, eager=True)
        self._core.do_not_compile = True
        for tokens in (self._runner.max_num_tokens, 1):
            self._runner._dummy_run(tokens, is_profile=True)
        self._core.do_not_compile = False

    def set_helper(self, helper: CompileHelper) -> None:
        self._helper = helper

    # --- beside the steps ---

    def ticket(self) -> int:
        """Return what ``compile`` takes. Those given before are worth nothing from now on."""
        with self._lock:
            self._wanted += 1
            return self._wanted

    def compile(self, ticket: int, *, held: list[int], counts: list[int]) -> dict[str, Any]:
        """Have the layout in force compiled in the helper, and wait for it.

        Nothing is done where its code is in use, or where there is none: a rank without layers passes on what it gets.

        Raises:
            CompileFailed
        """
        if self.state == COMPILED or not held:
            return {}
        self._failpoints.hit("worker.compile")
        if self._helper is None:
            raise CompileFailed("this worker has no helper that compiles")
        done = self._done(self._helper.start(held=held, counts=counts), ticket)
        if self._failpoints.hit("worker.slow_load"):
            done["load_s"] = _SLOW_S
        return done

    def _done(self, job: CompileJob, ticket: int) -> dict[str, Any]:
        with self._lock:
            if ticket != self._wanted:
                job.kill()  # stopped before it began
            self._job = job
        try:
            done = job.wait()
            with self._lock:
                if ticket != self._wanted:
                    raise CompileFailed("it is not wanted any more")
                self._artifact = Path(done["artifact"])
        finally:
            with self._lock:
                if self._job is job:
                    self._job = None
        return done

    def stop(self) -> None:
        """End what the helper is compiling, or is about to."""
        self.ticket()
        with self._lock:
            if self._job is not None:
                self._job.kill()

    # --- between two steps, in the main thread ---

    def fall_back(self) -> None:
        """Run eagerly from the next step on: a flag, nothing is built."""
        self._core.do_not_compile = True
        self._core.aot_compiled_fn = self._loaded = None
        with self._lock:
            self._artifact = None
            self._wanted += 1  # what is compiled now is for the old layout

    def load(self, held: list[int]) -> float:
        """Load what the helper has compiled; return the seconds it took. It is not used yet.

        Raises:
            CompileFailed: There is nothing to load.
        """
        if self.state == COMPILED or not held:
            return 0.0
        if self._artifact is None:
            raise CompileFailed("nothing was compiled for the layout in force")
        self._failpoints.hit("worker.load_compiled")
        started_s = time.perf_counter()
        self._loaded = compiled_internals.load_compiled(self._artifact, self._core, self._config)
        return time.perf_counter() - started_s

    def use(self) -> None:
        """Run what was loaded from the next step on."""
        if self._loaded is not None:
            self._core.aot_compiled_fn, self._loaded = self._loaded, None
            self._core.do_not_compile = False

    def drop(self) -> None:
        """Stay eager: another rank could not load."""
        self._loaded = None
