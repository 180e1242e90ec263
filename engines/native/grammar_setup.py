"""Whether output can be kept to grammars here: that takes llguidance, and a tokenizer of a kind that it reads."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.native.grammar import Grammars


def grammars_for(
    model_directory: Path, *, vocab_size: int, eos_token_ids: tuple[int, ...]
) -> tuple["Grammars | None", str]:
    """Return what makes matchers, or None with the reason.

    It takes the interpreter for a second or two, and 90 MiB, where the vocabulary has 128,000 tokens.
    """
    tokenizer = model_directory / "tokenizer.json"
    if not tokenizer.exists():
        return None, "the model has no tokenizer.json"
    try:
        from engines.native.grammar import Grammars
    except ModuleNotFoundError as missing:
        return None, str(missing)
    try:
        return Grammars(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids), ""
    except ValueError as error:
        return None, str(error)
