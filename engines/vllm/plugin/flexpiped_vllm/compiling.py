"""Processes that compile a rank's forward pass for another layout, so that no tracing runs beside the steps.

    worker --fork at start--> helper --fork per job--> guard -+--fork--> compiles, into vLLM's compile cache
                                                              +--fork--> loads that once, to tell what a load costs

The helper stays as it was when the worker had just started, and holds no weights. The guard leads a process group of
its own: the compilers that torch starts are in it, and end with it, whoever ends first. None of them touches a GPU.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from flexpiped_served.processes import die_with_parent, first_to_be_killed

from flexpiped_vllm import compiled_internals, internals
from flexpiped_vllm.layers import MadeLayers, build_layer

_NICE = 19
_MESSAGE_BYTES = 1 << 16
_PARTITION = "VLLM_PP_LAYER_PARTITION"


class CompileFailed(Exception):
    """A layout could not be compiled; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is compiled: the module whose forward runs the layers, and what makes them."""

    runner: Any
    core: Any
    made: MadeLayers
    config: Any


class CompileJob:
    """One layout that is being compiled."""

    def __init__(self, pid: int, result_fd: int) -> None:
        self.pid = pid
        self._result_fd = result_fd

    def wait(self) -> dict[str, Any]:
        """Return ``artifact``, ``compile_s`` (0 where it lay in the cache) and ``load_s``. Raises: CompileFailed."""
        with os.fdopen(self._result_fd, "rb") as file:
            answer: dict[str, Any] = json.loads(file.read() or b"{}")
        if "artifact" not in answer:
            raise CompileFailed(answer.get("error", "the process that compiles was ended"))
        return answer

    def kill(self) -> None:
        """End all of it, compilers included."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pid, signal.SIGKILL)


class CompileHelper:
    """The worker's side.

    Args:
        let_go: Called in the helper: drops the weights and KV caches that the fork has inherited.
    """

    def __init__(self, model: Model, *, let_go: Callable[[], None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        worker_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _serve(theirs, model, let_go, worker_pid=worker_pid)
        theirs.close()
        self._socket = ours

    def start(self, *, held: list[int], counts: list[int]) -> CompileJob:
        """Begin to compile for the layers ``held`` of a layout with ``counts`` layers on each rank.

        Raises:
            CompileFailed: The helper has ended.
        """
        ours, theirs = os.pipe()
        try:
            socket.send_fds(self._socket, [json.dumps([held, counts]).encode()], [theirs])
            raw = self._socket.recv(_MESSAGE_BYTES)
        except OSError as error:
            os.close(ours)
            raise CompileFailed(f"the process that starts compilations has ended: {error}") from error
        finally:
            os.close(theirs)
        if not raw:
            os.close(ours)
            raise CompileFailed("the process that starts compilations has ended")
        return CompileJob(int(raw), ours)


# --- in the helper ---


def _serve(connection: socket.socket, model: Model, let_go: Callable[[], None], *, worker_pid: int) -> NoReturn:
    """Start jobs until the worker closes the connection or ends."""
    status = 1
    try:
        die_with_parent(parent_pid=worker_pid)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for guards
        os.nice(_NICE)
        first_to_be_killed()
        internals.torch_threads(1)  # the thread pool of the worker does not exist here
        let_go()
        while True:
            raw, fds, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
            if not raw:
                break
            held, counts = json.loads(raw)
            helper_pid = os.getpid()
            guard_pid = os.fork()
            if guard_pid == 0:
                connection.close()
                _guard(fds[0], model, held, counts, helper_pid=helper_pid)
            os.close(fds[0])
            _lead_a_group(guard_pid)  # before anybody can ask to kill it
            connection.send(str(guard_pid).encode())
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _lead_a_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended, or it was there first
        os.setpgid(pid, pid)


# --- in the guard ---


def _guard(result_fd: int, model: Model, held: list[int], counts: list[int], *, helper_pid: int) -> NoReturn:
    _lead_a_group(os.getpid())
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    die_with_parent(parent_pid=helper_pid, by=signal.SIGTERM)
    answer = _compiled(model, held, counts)
    with os.fdopen(result_fd, "wb") as file:
        file.write(json.dumps(answer).encode())
    os._exit(0)


def _compiled(model: Model, held: list[int], counts: list[int]) -> dict[str, Any]:
    os.environ[_PARTITION] = ",".join(map(str, counts))
    path = compiled_internals.artifact_path(model.core, model.config)
    if path.exists():  # of this layout, when it was in force before
        loaded = _in_a_child(lambda: _load(model, path))
        if "error" not in loaded:
            return loaded | {"artifact": str(path), "compile_s": 0.0}
        path.unlink()
    made = _in_a_child(lambda: _compile(model, held, path))
    if "error" in made:
        return made
    loaded = _in_a_child(lambda: _load(model, path))
    return loaded if "error" in loaded else made | loaded | {"artifact": str(path)}


def _in_a_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do something in a process of its own, so that the next finds no trace of it."""
    ours, theirs = os.pipe()
    guard_pid = os.getpid()
    if os.fork() == 0:
        die_with_parent(parent_pid=guard_pid)
        try:
            answer = work()
        except Exception as error:  # noqa: BLE001  whatever torch raises is told to the worker
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(theirs, "wb") as file:
            file.write(json.dumps(answer).encode())
        sys.stderr.flush()
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as file:
        raw = file.read()
    os.wait()
    answer = json.loads(raw or b"{}")
    return answer or {"error": "the process that compiles has died"}


# --- in its children ---


class _Saved(Exception):
    """The code is in the cache. What vLLM would do next is to run it, with peers that know nothing of it."""


def _compile(model: Model, held: list[int], path: Path) -> dict[str, Any]:
    """Have vLLM compile for these layers as it does at start: it looks into its cache, traces, and saves there."""
    started_s = time.monotonic()
    core, config = model.core, model.config
    _place(model, held)
    _share_kernels(path.parents[1] / "inductor_cache")
    core.do_not_compile = False
    with internals.set_current_vllm_config(config, check_compile=False):
        compiled_internals.reset_compile_wrapper(core)
    save = core.save_aot_compiled_function

    def save_and_stop() -> None:
        save()
        raise _Saved

    core.save_aot_compiled_function = save_and_stop
    try:
        with torch.inference_mode():
            model.runner._dummy_run(model.runner.max_num_tokens, is_profile=True)
    except _Saved:
        pass
    if not path.exists():
        raise CompileFailed(f"vLLM did not save its code to {path}")
    return {"compile_s": time.monotonic() - started_s}


def _share_kernels(directory: Path) -> None:
    """Give a layout the kernels that the C++ compiler has built at start: most are those of any layer."""
    known = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    if known != directory:
        shutil.copytree(known, directory, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    with suppress(FileExistsError):  # ranks share the directory of a layout
        os.link(source, target)


def _place(model: Model, held: list[int]) -> None:
    """Put layers with memory for weights, but without any, where the layout has them."""
    made, core, config = model.made, model.core, model.config
    config.compilation_config.static_forward_context.clear()  # else their names would be taken
    device = torch.device("cpu")
    for index in range(len(made.modules)):
        made.modules[index] = internals.model_utils.PPMissingLayer()
    for index in held:
        layer = build_layer(made, index, config, device)
        internals.process_weights_after_loading(layer, config.model_config, device)
        made.modules[index] = layer
    core.start_layer, core.end_layer = (held[0], held[-1] + 1) if held else (0, 0)
    compiled_internals.choose_custom_ops(core, config, eager=False)


def _load(model: Model, path: Path) -> dict[str, Any]:
    """Load once as the worker will, in processor time: waiting for a core is no part of it."""
    started_s = time.process_time()
    compiled_internals.load_compiled(path, model.core, model.config)
    return {"load_s": time.process_time() - started_s}
