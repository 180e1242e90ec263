"""One worker's part in the handover of a request to another vLLM. All of it runs between two steps."""

import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from flexpiped_served.failpoints import Failpoints

from flexpiped_vllm import internals
from flexpiped_vllm.kv_files import KvFiles
from flexpiped_vllm.settings import Settings

ANSWERS = "kv-answers.dgram"  # of the engine core
_EXPECTED = (OSError, RuntimeError, ValueError, KeyError)  # a failpoint is a RuntimeError
_log = logging.getLogger("vllm.flexpiped")


class KvRank:
    """Mixed into vLLM's worker classes. The engine core calls without waiting; each call is answered by datagram."""

    vllm_config: Any
    model_runner: Any
    _failpoints: Failpoints

    def flexpiped_kv_out(self, number: int, directory: str, start: int, blocks: list[int], total: int) -> None:
        """Write some KV blocks of one request to shared memory."""

        def write() -> None:
            if not self._failpoints.hit("worker.kv_out"):
                self._kv_files.write(Path(directory), start=start, blocks=blocks, total=total)

        self._answer_kv(number, write)

    def flexpiped_kv_open(self, number: int, directory: str, total: int) -> None:
        """Make ready to load what another vLLM has written."""

        def open_files() -> None:
            self._failpoints.hit("worker.kv_open")
            self._kv_files.open(Path(directory), total=total)

        self._answer_kv(number, open_files)

    def flexpiped_kv_in(self, directory: str, first: int, blocks: list[int]) -> None:
        """Load KV blocks that the next step reads. Where that fails the process ends: the step would read garbage."""
        try:
            with torch.inference_mode():
                if not self._failpoints.hit("worker.kv_in"):  # a control leaves the copy out
                    self._kv_files.load(Path(directory), first=first, blocks=blocks)
        except _EXPECTED:
            _log.exception("the KV cache of a request could not be loaded")
            os._exit(1)

    def flexpiped_kv_close(self, directory: str) -> None:
        """Let go of what was opened."""
        self._kv_files.close(Path(directory))

    def kv_description(self) -> dict[str, Any]:
        """Return what the engine core has to know of this rank's KV cache."""
        files = self._kv_files
        return {"kv_form": files.form, "kv_layers": files.layers, "kv_block_bytes": files.block_bytes}

    @cached_property
    def _kv_files(self) -> KvFiles:
        return KvFiles(
            self.vllm_config.compilation_config.static_forward_context,
            num_blocks=self.model_runner.kv_cache_config.num_blocks,
            share=internals.get_tp_group().rank_in_group,
        )

    @cached_property
    def _kv_answers(self) -> socket.socket:
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def _answer_kv(self, number: int, work: Callable[[], None]) -> None:
        reason = ""
        try:
            with torch.inference_mode():
                work()
        except _EXPECTED as error:
            reason = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # the core is gone, and this process soon will be
            self._kv_answers.sendto(
                json.dumps([number, reason]).encode(), str(Settings.of_environment().directory / ANSWERS)
            )
