"""Words that an output must not have, as the tokens that spell them."""

import asyncio
from collections.abc import Iterable

from engines.text.protocol import Text


async def bad_words_as_tokens(text: Text, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Return each word as it is spelt at the beginning and, where that is another token, behind a space: as vLLM does.

    Raises:
        TextRefused, TextProcessDied, TextClosed
    """
    found: list[tuple[int, ...]] = []
    bare = [word.lstrip() for word in words]
    both = [spelt for word in bare for spelt in (word, f" {word}")]
    token_ids = await asyncio.gather(*(text.encode(each, add_special_tokens=False) for each in both))
    for first, spaced in zip(token_ids[::2], token_ids[1::2], strict=True):
        found.append(first)
        if first and len(spaced) == len(first) and spaced[0] != first[0]:
            found.append(spaced)
    return tuple(word for word in found if word)
