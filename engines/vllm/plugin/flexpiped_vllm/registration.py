"""The entry point that vLLM calls in each of its processes before anything else of it runs.

What is changed is changed in memory, in processes that a daemon started, and nowhere else: nothing is patched on disk.
"""

import os
from functools import wraps
from typing import Any

from flexpiped_served.processes import die_with_parent

from flexpiped_vllm.settings import Settings


def register() -> None:
    """Prepare this process. Called more than once in some processes."""
    if not Settings.present():
        return
    die_with_parent(parent_pid=os.getppid())
    from flexpiped_vllm import internals

    if "flexpiped" not in vars(internals.EngineCore):
        _extend_core(internals.EngineCore, internals.EngineCoreProc)
        if not internals.check():
            from flexpiped_vllm.layers import record_layers

            record_layers()


def _extend_core(core_class: Any, process_class: Any) -> None:
    """Give vLLM's engine core a conductor, and the utility calls that reach it."""
    from flexpiped_vllm import internals
    from flexpiped_vllm.core import Conductor
    from flexpiped_vllm.kv_transfers import KvTransfers

    original_loop = process_class.run_busy_loop
    original_handle = process_class._handle_client_request
    wakeup = internals.EngineCoreRequestType.WAKEUP

    def run_busy_loop(self: Any) -> None:
        self.flexpiped = Conductor(self)
        original_loop(self)

    def handle(self: Any, request_type: Any, request: Any) -> None:
        original_handle(self, request_type, request)
        if request_type == wakeup:
            self.flexpiped.pump()

    process_class.run_busy_loop = run_busy_loop
    process_class._handle_client_request = handle
    core_class.flexpiped = None
    for method in (
        Conductor.info,
        Conductor.counters,
        Conductor.trace,
        Conductor.begin,
        Conductor.round,
        Conductor.commit,
        Conductor.load_compiled,
        Conductor.pause,
        Conductor.abandon,
        Conductor.settle,
        Conductor.arm,
    ):
        setattr(core_class, f"flexpiped_{method.__name__}", _forward(method, lambda conductor: conductor))
    for method in (KvTransfers.export, KvTransfers.accept, KvTransfers.forget, KvTransfers.tokens):
        setattr(core_class, f"flexpiped_kv_{method.__name__}", _forward(method, lambda conductor: conductor.kv))


def _forward(method: Any, part_of: Any) -> Any:
    """Return ``method`` of a part of the conductor as a method of the engine core."""

    @wraps(method)  # vLLM looks at the signature
    def call(self: Any, *args: Any) -> Any:
        return method(part_of(self.flexpiped), *args)

    return call
