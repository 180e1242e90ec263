"""The model families that are known exactly: how to read their config.json, and which engines run them.

A family is one function from config to ``Architecture`` and one line in ``FAMILIES``. More can be planned with than is
run: the native engine runs few of these, vLLM all, and vLLM's further families have an estimated graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from planner import learnt_families, rotary_families
from planner.architecture import Architecture, Config
from planner.errors import UnsupportedModel

NATIVE: Final = "native"
VLLM: Final = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read a family's config.json, which classes of transformers its checkpoints may name, and who runs it."""

    read: Callable[[Config], Architecture]
    classes: frozenset[str]
    engines: frozenset[str] = frozenset({VLLM})


def _family(
    read: Callable[[Config], Architecture], prefix: str, *, causal: str = "ForCausalLM", native: bool = False
) -> Family:
    classes = frozenset({prefix + causal, prefix + "Model"})
    return Family(read=read, classes=classes, engines=frozenset({VLLM, NATIVE} if native else {VLLM}))


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma2": _family(rotary_families.gemma2, "Gemma2"),
        "gpt2": _family(learnt_families.gpt2, "GPT2", causal="LMHeadModel", native=True),
        "llama": _family(rotary_families.llama, "Llama", native=True),
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


def families_of(engine: str) -> tuple[str, ...]:
    """Return the model types that ``engine`` runs, of those known here."""
    return tuple(sorted(name for name, family in FAMILIES.items() if engine in family.engines))


def read_architecture(values: Mapping[str, object], *, engine: str | None = None) -> Architecture:
    """Return what a parsed config.json describes. With ``engine``, refuse what that engine does not run.

    Raises:
        UnsupportedModel: Another family, a feature that is not supported, or a value that cannot be.
    """
    model_type = values.get("model_type")
    supported = ", ".join(sorted(FAMILIES) if engine is None else families_of(engine))
    if model_type not in FAMILIES:
        named = f"model_type {model_type!r}" if model_type else "a config.json without model_type"
        raise UnsupportedModel(f"{named} is not supported; supported are: {supported}")
    family = FAMILIES[str(model_type)]
    if engine is not None and engine not in family.engines:
        others = " or ".join(sorted(family.engines))
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported by the {engine} engine; supported are: {supported}. "
            f"The {others} engine runs it"
        )
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
