"""What vLLM cannot cut into several pipeline ranks, and what it does not divide between them. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from planner.model_graph import LayerKind

# Whose classes in vLLM 0.32 make the embedding on the first rank only (on the last, too, where the head is tied to it),
# and the head on the last.
_DIVIDED: Final = frozenset(
    {"llama", "mistral", "phi3", "qwen2", "qwen3", "granite", "glm4", "glm4_moe", "deepseek_v2", "deepseek_v3"}
    | {"nemotron", "exaone", "exaone4", "exaone_moe", "apertus", "solar", "mimo", "minimax_m2", "bailing_moe"}
    | {"ernie4_5_moe"}
)

# No class of theirs in vLLM 0.32 has a pipeline: it ends at its start, after it has imported everything.
_NO_PIPELINE: Final = frozenset(
    {"bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "new"}  # encoders; "new" is GTE's
    | {"aria", "gemma3n", "gemma3n_text", "idefics3", "mamba2", "smolvlm", "whisper", "zamba2"}
)


def one_rank_reason(model_type: str, *, args: Sequence[str] = ()) -> str:
    """Say why vLLM runs a model in one pipeline rank only, and what to do; empty: it may have more.

    Args:
        model_type: As in config.json.
        args: Of vLLM's command line, as configured.
    """
    if model_type not in _NO_PIPELINE or _is_of_transformers(args):
        return ""
    return (
        f"vLLM runs {model_type} models in one pipeline rank only (it has no pipeline for them, and ends at the start "
        "of more): set stages = 1, with engines.vllm.tensor_parallel for more devices"
    )


def _is_of_transformers(args: Sequence[str]) -> bool:
    """Whether vLLM is told to take the model's class of transformers, which it cuts by itself."""
    words = [word for each in args for word in each.replace("_", "-").split("=", 1)]
    return ("--model-impl", "transformers") in pairwise(words)


def on_every_rank(model_type: str) -> frozenset[LayerKind]:
    """Return what each pipeline rank has in memory, whether it computes with it or not; of families not known, all."""
    return frozenset() if model_type in _DIVIDED else frozenset({LayerKind.EMBEDDING, LayerKind.HEAD})
