"""What SGLang cannot cut into several pipeline ranks, and what it does not divide between them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from engines.errors import EngineStartFailed
from planner.model_graph import LayerKind

# Their classes in SGLang 0.5.23 take the embedding for the head where config.json ties the two, and of several ranks
# the last has no embedding: the first token ends SGLang. Other families give the last rank a table of its own.
_HEAD_IS_THE_EMBEDDING: Final = frozenset(
    {"llama", "mistral", "ministral3", "phi3", "internlm3", "llama4_text", "apertus", "bailing_moe", "exaone_moe"}
    | {"llada2_moe", "nemotron-nas", "opt", "teleflm"}
)


# The pipeline loop of SGLang 0.5.23 takes any result for that of a generation: the first text to embed ends it.
NO_PIPELINE_OF_VECTORS: Final = (
    "SGLang runs models that only embed, classify or score in one pipeline rank only: set stages = 1, with "
    "engines.sglang.tensor_parallel for more devices, or take another engine"
)


def one_rank_reason(model_type: str, *, tied: bool, args: Sequence[str] = ()) -> str:
    """Say why SGLang runs a model in one pipeline rank only, and what to do; empty: it may have more.

    Args:
        model_type: As in config.json.
        tied: The head is the embedding's table.
        args: Of SGLang's command line, as configured.
    """
    if any(argument.replace("_", "-") == "--is-embedding" for argument in args):
        return NO_PIPELINE_OF_VECTORS
    if not tied or model_type not in _HEAD_IS_THE_EMBEDDING:
        return ""
    return (
        f"SGLang runs {model_type} models whose head is tied to the embedding in one pipeline rank only (of several, "
        "the last fails at the first token): set stages = 1, with engines.sglang.tensor_parallel for more devices, or "
        "take another engine"
    )


def ensure_no_pipeline_of_vectors(info: Mapping[str, Any]) -> None:
    """Return when an SGLang that is ready can do what its model is for. ``info`` is what it says of itself.

    Raises:
        EngineStartFailed
    """
    if info["pp_size"] > 1 and not info.get("generates", True):
        raise EngineStartFailed(NO_PIPELINE_OF_VECTORS)


# Where the classes of SGLang 0.5.23 make the embedding on the first rank only, and the head on the last.
_ONE_EMBEDDING: Final = frozenset(
    {"llama", "mistral", "ministral3", "phi3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss", "glm4"}
    | {"glm4_moe", "exaone4", "exaone_moe", "apertus", "bailing_moe", "granitemoehybrid", "solar", "orion"}
)
_ONE_HEAD: Final = frozenset({"qwen2", "qwen3", "exaone4", "glm4", "minimax_m2", "solar", "orion", "deepseek_v3"})


def on_every_rank(model_type: str) -> frozenset[LayerKind]:
    """Return what each pipeline rank has in memory, whether it computes with it or not; of families not known, all."""
    embedding = set() if model_type in _ONE_EMBEDDING else {LayerKind.EMBEDDING}
    head = set() if model_type in _ONE_HEAD else {LayerKind.HEAD}
    return frozenset(embedding | head)
