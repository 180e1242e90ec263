"""What the text process needs of a tokenizer, and how to get it from a ``tokenizers.Tokenizer``."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import dropwhile
from typing import Any, Protocol

from tokenizers import Tokenizer

from engines.text.detokenize import (
    ByteLevelDetokenizer,
    Detokenizer,
    MarkingDetokenizer,
    WindowDetokenizer,
    byte_level_bytes,
    is_byte_fallback,
    is_byte_level,
    is_inside_character,
)
from engines.text.pieces import PieceOf
from engines.text.wire import About, ChatOptions

DetokenizerFactory = Callable[[tuple[int, ...]], Detokenizer]  # the tail of the prompt -> for one output


class TextTokenizer(Protocol):
    """A tokenizer as the text process uses it."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Raises: TextRefused."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        """Render the chat template, by default up to where the answer begins. Raises: TextRefused."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones included. Raises: TextRefused."""

    def detokenizer(self, prompt_tail: tuple[int, ...]) -> Detokenizer: ...

    @property
    def piece(self) -> PieceOf:
        """What gives the bytes of one token."""

    @property
    def about(self) -> About: ...


def detokenizers_of(tokenizer: Tokenizer) -> DetokenizerFactory:
    """Return a factory whose outputs equal ``tokenizer.decode(ids, skip_special_tokens=True)``.

    For decoders other than byte level they equal what the output adds to the text of the prompt's tail.
    """
    special_ids = frozenset(
        token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    )
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else None
    if decoder is not None and is_byte_level(decoder):

        @functools.cache
        def bytes_of(token_id: int) -> bytes:
            token = tokenizer.id_to_token(token_id)
            return b"" if token is None or token_id in special_ids else byte_level_bytes(token)

        return lambda _prompt_tail: ByteLevelDetokenizer(bytes_of)

    has_fallback = decoder is not None and '"ByteFallback"' in json.dumps(decoder)

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    @functools.cache
    def is_special(token_id: int) -> bool:
        return token_id in special_ids or tokenizer.id_to_token(token_id) is None

    return window_detokenizers(
        decode,
        is_special=is_special,
        token_of=tokenizer.id_to_token if has_fallback else lambda _token_id: None,
    )


def window_detokenizers(
    decode: Callable[[list[int]], str],
    *,
    is_special: Callable[[int], bool],
    token_of: Callable[[int], str | None],
) -> DetokenizerFactory:
    """Return a factory for decoders whose tokens depend on their neighbours.

    Args:
        token_of: The token behind an id where raw bytes (``<0xE2>``) are tokens, else None.
    """

    @functools.cache
    def is_pending(token_id: int) -> bool:
        token = token_of(token_id)
        return token is not None and is_byte_fallback(token)

    def whole_characters(prompt_tail: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tail without the rest of a character at its beginning, which would spoil all bytes behind it."""
        tail = [token_id for token_id in prompt_tail if not is_special(token_id)]
        return tuple(dropwhile(lambda token_id: is_inside_character(token_of(token_id)), tail))

    return lambda prompt_tail: WindowDetokenizer(
        decode, is_special=is_special, is_pending=is_pending, prompt_tail=whole_characters(prompt_tail)
    )


def added_tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of the tokens that are looked for before text is divided, special or not."""
    return {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}


def detokenizer_with(marks: Sequence[str], tokenizer: TextTokenizer, *, prompt_tail: tuple[int, ...]) -> Detokenizer:
    """Return a detokenizer for one output, in which the added tokens ``marks`` are text, also if they are special."""
    added = tokenizer.about.added_tokens
    shown = {added[mark]: mark for mark in marks if mark in added}
    if not shown:
        return tokenizer.detokenizer(prompt_tail)
    return MarkingDetokenizer(lambda: tokenizer.detokenizer(prompt_tail), shown)
