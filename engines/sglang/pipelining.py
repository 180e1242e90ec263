"""What SGLang cannot cut into several pipeline ranks. Pure."""

from typing import Final

# Their classes in SGLang 0.5.23 take the embedding for the head where config.json ties the two, and of several ranks
# the last has no embedding: the first token ends SGLang. Other families give the last rank a table of its own.
_HEAD_IS_THE_EMBEDDING: Final = frozenset(
    {"llama", "mistral", "ministral3", "phi3", "internlm3", "llama4_text", "apertus", "bailing_moe", "exaone_moe"}
    | {"llada2_moe", "nemotron-nas", "opt", "teleflm"}
)


def one_rank_reason(model_type: str, *, tied: bool) -> str:
    """Say why SGLang runs a model in one pipeline rank only, and what to do; empty: it may have more.

    Args:
        model_type: As in config.json.
        tied: The head is the embedding's table.
    """
    if not tied or model_type not in _HEAD_IS_THE_EMBEDDING:
        return ""
    return (
        f"SGLang runs {model_type} models whose head is tied to the embedding in one pipeline rank only (of several, "
        "the last fails at the first token): set stages = 1, with engines.sglang.tensor_parallel for more devices, or "
        "take another engine"
    )
