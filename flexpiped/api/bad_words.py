"""Words that an output must not have, as the tokens that spell them."""

from collections.abc import Iterable

from engines.text.protocol import Text


async def bad_words_as_tokens(text: Text, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
    """Return each word as it is spelt at the beginning and, where that is another token, behind a space: as vLLM does.

    Raises:
        TextRefused, TextProcessDied, TextClosed
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        bare = word.lstrip()
        first = await text.encode(bare, add_special_tokens=False)
        spaced = await text.encode(f" {bare}", add_special_tokens=False)
        found.append(first)
        if first and len(spaced) == len(first) and spaced[0] != first[0]:
            found.append(spaced)
    return tuple(word for word in found if word)
