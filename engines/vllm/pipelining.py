"""What vLLM does not divide between several pipeline ranks. Pure."""

from typing import Final

from planner.model_graph import LayerKind

# Whose classes in vLLM 0.32 make the embedding on the first rank only (on the last, too, where the head is tied to it),
# and the head on the last.
_DIVIDED: Final = frozenset(
    {"llama", "mistral", "phi3", "qwen2", "qwen3", "granite", "glm4", "glm4_moe", "deepseek_v2", "deepseek_v3"}
    | {"nemotron", "exaone", "exaone4", "exaone_moe", "apertus", "solar", "mimo", "minimax_m2", "bailing_moe"}
    | {"ernie4_5_moe"}
)


def on_every_rank(model_type: str) -> frozenset[LayerKind]:
    """Return what each pipeline rank has in memory, whether it computes with it or not; of families not known, all."""
    return frozenset() if model_type in _DIVIDED else frozenset({LayerKind.EMBEDDING, LayerKind.HEAD})
