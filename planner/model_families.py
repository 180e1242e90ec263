"""The model families that are known exactly: how to read their config.json.

A family is one function from config to ``Architecture`` and one line in ``FAMILIES``. The native engine runs all of
these and no others; for further families of other engines there is an estimated graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from planner import learnt_families, rotary_families
from planner.architecture import Architecture, Config
from planner.errors import UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read a family's config.json, and which classes of transformers its checkpoints may name."""

    read: Callable[[Config], Architecture]
    classes: frozenset[str]


def _family(
    read: Callable[[Config], Architecture], prefix: str, *, causal: str = "ForCausalLM", base: str = "Model"
) -> Family:
    return Family(read=read, classes=frozenset({prefix + causal, prefix + base}))


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma2": _family(rotary_families.gemma2, "Gemma2"),
        "gemma3_text": _family(rotary_families.gemma3, "Gemma3", base="TextModel"),
        "gpt2": _family(learnt_families.gpt2, "GPT2", causal="LMHeadModel"),
        "gpt_neox": _family(rotary_families.gpt_neox, "GPTNeoX"),
        "llama": _family(rotary_families.llama, "Llama"),
        "mistral": _family(rotary_families.mistral, "Mistral"),
        "mixtral": _family(rotary_families.mixtral, "Mixtral"),
        "opt": _family(learnt_families.opt, "OPT"),
        "phi3": _family(rotary_families.phi3, "Phi3"),
        "qwen2": _family(rotary_families.qwen2, "Qwen2"),
        "qwen3": _family(rotary_families.qwen3, "Qwen3"),
        "qwen3_moe": _family(rotary_families.qwen3_moe, "Qwen3Moe"),
    }
)

UNSUPPORTED_FEATURES = {  # keys of config.json that must be absent, null or false
    "quantization_config": "quantised weights are",
    "is_encoder_decoder": "an encoder is",
    "add_cross_attention": "cross-attention is",
}


def read_architecture(values: Mapping[str, object]) -> Architecture:
    """Return what a parsed config.json describes.

    Raises:
        UnsupportedModel: Another family, a feature that is not supported, or a value that cannot be.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = f"model_type {model_type!r}" if model_type else "a config.json without model_type"
        raise UnsupportedModel(f"{named} is not supported; supported are: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    architectures = values.get("architectures")
    if isinstance(architectures, list) and architectures and not family.classes.intersection(map(str, architectures)):
        raise UnsupportedModel(
            f"architecture {architectures[0]} is not a causal language model; "
            f"of {model_type}, supported are: {', '.join(sorted(family.classes))}"
        )
    for key, feature in UNSUPPORTED_FEATURES.items():
        if values.get(key):
            raise UnsupportedModel(f"config.json: {key}: {feature} not supported")
    return family.read(Config(values))
