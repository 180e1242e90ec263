"""One scheduler's side of the plugin: answers the daemon beside the steps, and counts them."""

import os
import sys
import time
from functools import wraps
from typing import Any

import torch
from flexpiped_served.side import Reply, SideChannel
from sglang.srt.runtime_context import get_parallel
from sglang.version import __version__

from flexpiped_sglang.counting import Counting
from flexpiped_sglang.settings import Settings

_SWITCH_S = 0.0005  # so that a thread's bits of Python never hold a step up for long


class Rank:
    """Added to one scheduler when it is ready. The side channel's threads only read what steps change."""

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        sys.setswitchinterval(_SWITCH_S)
        self._scheduler = scheduler
        self._busy_s = 0.0
        parallel = get_parallel()
        number = parallel.pp_rank * parallel.tp_size + parallel.tp_rank
        self._time_steps()
        self._side = SideChannel(settings.directory / f"rank-{number}.sock", self._handle)
        if number == 0:
            self._counting = Counting(scheduler)
            self._core = SideChannel(settings.directory / "engine.sock", self._handle_core, greeting=self._ready)

    def _time_steps(self) -> None:
        run = self._scheduler.run_batch

        @wraps(run)
        def run_batch(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = run(*args, **kwargs)
            self._busy_s += time.perf_counter() - started
            return result

        self._scheduler.run_batch = run_batch

    # --- calls ---

    def _handle(self, message: dict[str, Any], reply: Reply) -> None:
        if message["op"] == "status":
            reply({"op": "reply", "call": message["call"], "result": self._status()})
        else:
            reply({"op": "reply", "call": message["call"], "error": f"no {message['op']} here"})

    def _handle_core(self, message: dict[str, Any], reply: Reply) -> None:
        if message["method"] == "flexpiped_counters":
            reply({"op": "reply", "call": message["call"], "result": self._counting.counters()})
        else:
            reply({"op": "reply", "call": message["call"], "error": f"no {message['method']} here"})

    def _status(self) -> dict[str, Any]:
        runner = self._scheduler.tp_worker.model_runner
        kv = self._scheduler.token_to_kv_pool_allocator.get_kvcache().get_kv_size_bytes()  # keys and values, or both
        return {
            "pid": os.getpid(),
            "weights_bytes": sum(_bytes(each) for each in runner.model.parameters()),
            "kv_mapped_bytes": int(sum(kv) if isinstance(kv, tuple) else kv),
            "busy_s": self._busy_s,
            "runs": "",
        }

    def _ready(self) -> dict[str, Any]:
        scheduler, config = self._scheduler, self._scheduler.model_config
        return {
            "op": "ready",
            "version": __version__,
            "vocab_size": int(config.vocab_size),
            # SGLang keeps some of the context for itself: the longest prompt and output that it takes
            "max_model_len": int(min(config.context_len, scheduler.max_total_num_tokens)),
            "eos_token_ids": sorted(config.hf_eos_token_id or ()),
            "refactor_refusal": "layers do not move in place in SGLang yet",
            "kv_form": "",
            "kv_refusal": "",
        }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
