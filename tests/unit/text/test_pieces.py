"""The bytes of single tokens, of each kind of tokenizer."""

import pytest

from engines.text.pieces import pieces_of
from tests.support.tiny_tokenizer import (
    BOS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    word_piece_tokenizer,
)

TEXT = "Once upon 漢字 🙂 naïve"


def test_pieces_of_byte_level_tokens_make_up_the_text() -> None:
    tokenizer = byte_level_tokenizer()
    piece_of = pieces_of(tokenizer)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert b"".join(map(piece_of, token_ids)) == TEXT.encode()
    assert any(not _is_whole(piece_of(token_id)) for token_id in token_ids)  # characters are split


def test_special_tokens_read_as_they_are_written_and_unknown_ones_as_nothing() -> None:
    for tokenizer in (byte_level_tokenizer(), byte_fallback_tokenizer()):
        piece_of = pieces_of(tokenizer)
        assert piece_of(tokenizer.token_to_id(BOS)) == BOS.encode()
        assert piece_of(99_999) == b""


def test_pieces_with_byte_fallback_keep_their_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    piece_of = pieces_of(tokenizer)
    assert piece_of(tokenizer.token_to_id("▁upon")) == b" upon"
    assert piece_of(tokenizer.token_to_id("漢")) == "漢".encode()
    assert piece_of(tokenizer.token_to_id("<0xE6>")) == b"\xe6"


@pytest.mark.parametrize(("token", "piece"), [("##s", b"s"), ("world", b" world"), ("漢", " 漢".encode())])
def test_pieces_of_words_are_what_they_add_to_a_text(token: str, piece: bytes) -> None:
    tokenizer = word_piece_tokenizer()
    assert pieces_of(tokenizer)(tokenizer.token_to_id(token)) == piece


def _is_whole(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True
