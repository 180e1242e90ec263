"""What is wrong with a tokenizer's files where transformers cannot read them, or reads a tokenizer without words."""

import json
from pathlib import Path
from typing import Any, Final

_TOKENIZER: Final = "tokenizer.json"
_JSON: Final = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_OTHERS: Final = ("tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model")
_POINTER: Final = b"version https://git-lfs"


def hint_at(model: Path) -> str:
    """Return the likeliest reason why there is no tokenizer in ``model``; empty: nothing is to be seen."""
    for name in _JSON:
        file = model / name
        if file.is_file() and (fault := _fault(file.read_bytes())):
            return f"{name} is {fault}"
    if (model / _TOKENIZER).is_file():
        return ""
    others = [name for name in _OTHERS if (model / name).is_file()]
    if others:
        return f"there is no {_TOKENIZER}, and for {others[0]} sentencepiece, tiktoken or mistral-common is needed"
    return f"there is no {_TOKENIZER}"


def _fault(content: bytes) -> str:
    """Say why this is no JSON object; empty: it is one."""
    if content.startswith(_POINTER):
        return "a git-lfs pointer, not the file: run git lfs pull"
    try:
        return "" if isinstance(json.loads(content), dict) else "not a JSON object"
    except ValueError as error:
        return f"not valid JSON: {error}"


def has_words(tokenizer: Any) -> bool:
    """Tell whether there are tokens besides added ones: transformers makes a tokenizer of a class name alone, too."""
    return not tokenizer.get_vocab().keys() <= {token.content for token in tokenizer.added_tokens_decoder.values()}
