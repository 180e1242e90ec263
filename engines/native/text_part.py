"""The language model inside a checkpoint that sees images, too: what is stored around it is left where it lies.

Gemma 3 from 4 B on is published so only. Two generations of names are in use for its text part: the hub's files have
``language_model.model.``, what newer transformers may write ``model.language_model.``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from engines.checkpoint import Checkpoint

_OUTER_WINS = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")  # said of the whole model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Composite:
    """``prefixes`` of stored names become what they map to; tensors with none of them are not the text's."""

    architecture: str
    prefixes: Mapping[str, str]


_COMPOSITES: Mapping[str, _Composite] = MappingProxyType(
    {
        "gemma3": _Composite(
            architecture="Gemma3ForCausalLM",
            prefixes=MappingProxyType(
                {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
                | {"model.language_model.": "model.", "lm_head.": "lm_head."}
            ),
        )
    }
)


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint as that of its language model alone; one that is that already comes back unchanged."""
    composite = _COMPOSITES.get(str(checkpoint.config.get("model_type")))
    inner = checkpoint.config.get("text_config")
    if composite is None or not isinstance(inner, Mapping):
        return checkpoint
    outer = {key: checkpoint.config[key] for key in _OUTER_WINS if checkpoint.config.get(key) is not None}
    return replace(
        checkpoint,
        config={**inner, **outer, "architectures": [composite.architecture]},
        tensors={
            new + name.removeprefix(old): entry
            for name, entry in checkpoint.tensors.items()
            for old, new in composite.prefixes.items()
            if name.startswith(old)
        },
    )
