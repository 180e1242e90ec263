"""The bytes of single tokens, for those who report tokens and not text. A character may be split between several."""

import functools
import json
from collections.abc import Callable

from tokenizers import Tokenizer

from engines.text.detokenize import byte_level_bytes, is_byte_fallback, is_byte_level

PieceOf = Callable[[int], bytes]


def pieces_of(tokenizer: Tokenizer) -> PieceOf:
    """Return what gives a token's bytes; special tokens read as they are written, unknown ids as nothing."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else None
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if decoder is not None and is_byte_level(decoder):

        @functools.cache
        def piece_of(token_id: int) -> bytes:
            token = tokenizer.id_to_token(token_id)
            if token is None:
                return b""
            return token.encode() if token_id in special else byte_level_bytes(token)

        return piece_of
    return window_pieces(
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
        token_of=tokenizer.id_to_token,
        is_special=special.__contains__,
    )


def window_pieces(
    decode: Callable[[list[int]], str], *, token_of: Callable[[int], str | None], is_special: Callable[[int], bool]
) -> PieceOf:
    """Return the same for decoders that read a token by its neighbours: each is read behind an ordinary one."""

    @functools.cache
    def anchor() -> tuple[list[int], str]:
        token_id, found = 0, token_of(0)
        while found is not None:
            if not is_special(token_id) and not is_byte_fallback(found) and decode([token_id]).strip().isalpha():
                return [token_id], decode([token_id])
            token_id += 1
            found = token_of(token_id)
        return [], ""

    @functools.cache
    def piece_of(token_id: int) -> bytes:
        token = token_of(token_id)
        if token is None:
            return b""
        if is_special(token_id):
            return token.encode()
        if is_byte_fallback(token):
            return bytes([int(token[3:5], 16)])
        before, text = anchor()
        return decode([*before, token_id])[len(text) :].encode()

    return piece_of
