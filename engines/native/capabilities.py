"""What the native engine can do, once its core is ready (pure)."""

from engines.native import client_messages as c
from engines.native.options import NativeOptions
from engines.native.shaping import ENGINE_PARAMS
from engines.protocol import EngineCapabilities


def capabilities_of(
    ready: c.Ready, options: NativeOptions, *, num_decoders: int, adapters: tuple[str, ...]
) -> EngineCapabilities:
    """Return what the core says, and what is so of every native engine with these options."""
    return EngineCapabilities(
        name="native",
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        eos_token_ids=ready.eos_token_ids,
        refactors_in_place=True,
        max_stages=min(len(options.device_ids), num_decoders),
        tensor_parallel=False,
        kv_range=ready.kv_range,
        engine_params=ENGINE_PARAMS,
        grammars=ready.grammars,
        top_logprobs=True,
        adapters=adapters,
        changes_adapters=True,
        caches_prefixes=options.prefix_caching,
    )
