"""What moves in place read of SGLang's live objects, by name, and which of it is not there. Knows nothing of SGLang."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

OF_SCHEDULER = (
    *("server_args", "model_config", "device", "page_size", "max_total_num_tokens", "max_req_input_len"),
    *("_engine_paused", "running_batch", "last_batch", "waiting_queue", "chunked_req"),
    *("pool_stats_observer.get_pool_stats", "grammar_manager.grammar_queue", "request_receiver.recv_skipper"),
    *("spec_algorithm.is_none", "disaggregation_mode.name", "tp_worker.model_runner.model"),
    *("tp_worker.model_runner.loader", "token_to_kv_pool_allocator.get_kvcache"),
)
OF_PARALLEL = ("pp_rank", "pp_size", "pp_async_batch_depth", "tp_rank", "tp_size", "attn_dp_size", "attn_cp_size")
# Of what gives out KV slots, and of the memory that has them, where they are of the kinds that are understood.
OF_ALLOCATOR = ("size", "page_size", "free_pages", "release_pages", "free_group")
OF_POOL = (
    *("size", "page_size", "k_buffer", "v_buffer", "start_layer", "end_layer", "layer_num", "model_layer_ids"),
    "_kv_buffer_descs",
)


def refusal_without(thing: Any, paths: Sequence[str]) -> str:
    """Return why layers cannot move where ``thing`` has not all of ``paths``, or nothing."""
    missing = [path for path in paths if not _has(thing, path)]
    return f"this SGLang's {type(thing).__name__} has no {', '.join(missing)}" if missing else ""


def _has(thing: Any, path: str) -> bool:
    try:
        attrgetter(path)(thing)
    except AttributeError:
        return False
    return True
