"""A KV connector of vLLM's: the scheduler loads a request's KV cache from shared memory instead of computing it.

It is the scheduler's for as long as KV caches from another instance are at hand and no longer: a vLLM that has one all
the time collects an answer from every rank at each step. Its other half is no worker connector but a call that goes
out ahead of the step, through the queue that carries the steps, so that layers may move between ranks as ever.
"""

from collections.abc import Callable
from typing import Any

from flexpiped_vllm import internals

KEY = "flexpiped"  # in a request's ``kv_transfer_params``: the directory of its KV cache


class Metadata(internals.KVConnectorMetadata):  # type: ignore[misc]
    """Nothing: loads go out by themselves."""


class SharedMemoryConnector(internals.KVConnectorBase, internals.SupportsHMA):  # type: ignore[misc]
    """The scheduler's side; there is no other.

    ``load`` is called before the step that reads: directory, number of the first KV block there, KV blocks here.
    """

    load: Callable[[str, int, list[int]], None]

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_tokens = int(vllm_config.cache_config.block_size)
        self._tokens_at: dict[str, int] = {}
        self._loads: list[tuple[str, int, list[int]]] = []

    def offer(self, directory: str, num_tokens: int) -> None:
        """The KV cache of ``num_tokens`` tokens is at hand in ``directory``."""
        self._tokens_at[directory] = num_tokens

    def withdraw(self, directory: str) -> bool:
        """It is no more. Return whether any other is. Idempotent."""
        self._tokens_at.pop(directory, None)
        return bool(self._tokens_at)

    # --- asked by the scheduler, in this order ---

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens can be loaded beyond those cached here. The last token is always computed."""
        there = min(self._tokens_at.get(self._directory_of(request), 0), request.num_tokens - 1)
        return max(0, there - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        directory = self._directory_of(request)
        tokens = min(self._tokens_at[directory], request.num_tokens - 1)
        first = (tokens - num_external_tokens) // self._block_tokens  # whole blocks are cached here
        (ids,) = blocks.get_block_ids()
        self._loads.append((directory, first, ids[first : -(-tokens // self._block_tokens)]))

    def build_connector_meta(self, _scheduler_output: Any) -> Metadata:
        loads, self._loads = self._loads, []
        for directory, first, blocks in loads:
            self.load(directory, first, blocks)
        return Metadata()

    def request_finished_all_groups(self, _request: Any, _block_ids: Any) -> tuple[bool, None]:
        return False, None  # nothing is on its way: its KV blocks are free

    def _directory_of(self, request: Any) -> str:
        return str((request.kv_transfer_params or {}).get(KEY, ""))

    # --- a worker's side, which is never made ---

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_layer_load(self, layer_name: str) -> None:
        raise NotImplementedError

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def wait_for_save(self) -> None:
        raise NotImplementedError


def make_connector(config: Any, kv_cache_config: Any) -> SharedMemoryConnector:
    """Return a connector for a vLLM that was started without one, made as vLLM makes its own."""
    made: SharedMemoryConnector = internals.create_scheduler_connector(
        config, kv_cache_config, name=SharedMemoryConnector.__name__, module=__name__
    )
    return made
