"""Which tokens end a sequence, by what a model's files say."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from engines.checkpoint import Checkpoint
from engines.errors import UnsupportedByEngine

EOS: Final = "eos_token_id"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_TOKENIZER: Final = "tokenizer.json"


def eos_token_ids(checkpoint: Checkpoint, *, default: object, vocab_size: int) -> tuple[int, ...]:
    """Return the ids that end a sequence, as vLLM finds them.

    1. Those of generation_config.json; without any there, those of config.json; without these the family's ``default``.
    2. And the one that the tokenizer says ends a text: chat models are trained to end an answer with it.

    What is not in the vocabulary cannot come.

    Raises:
        UnsupportedByEngine: A file says something else than token ids.
    """
    sources = ((checkpoint.generation_config, "generation_config.json"), (checkpoint.config, "config.json"))
    given = next((_ids(source[EOS], where) for source, where in sources if source.get(EOS) is not None), None)
    found = _ids(default, "config.json") if given is None and default is not None else given or ()
    own = tokenizer_eos(checkpoint.directory)
    together = found if own is None else (*found, own)
    return tuple(each for each in dict.fromkeys(together) if 0 <= each < vocab_size)


def _ids(value: object, where: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise UnsupportedByEngine(f"{where}: {EOS} must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def tokenizer_eos(directory: Path) -> int | None:
    """Return the id of the token that a tokenizer's files call ``eos_token``; None where they name none.

    Files that cannot be read are for the text process to complain of, which reads all of them.
    """
    config = _object(directory / _TOKENIZER_CONFIG)
    named = config.get("eos_token")
    token = named.get("content") if isinstance(named, dict) else named
    if not isinstance(token, str):
        return None
    return next((id_ for content, id_ in _added(config, directory) if content == token), None)


def _added(config: Mapping[str, Any], directory: Path) -> Iterator[tuple[object, int]]:
    """Yield added tokens with their ids; the small file first, as reading the large one takes a while."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        yield from ((token.get("content"), int(id_)) for id_, token in decoder.items() if isinstance(token, dict))
    for token in _object(directory / _TOKENIZER).get("added_tokens") or ():
        yield token["content"], token["id"]


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
