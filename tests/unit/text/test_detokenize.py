"""Deltas add up to what the whole decodes to, and never hold part of a character."""

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from engines.text.detokenize import Detokenizer, byte_level_bytes, is_byte_level
from engines.text.tokenizer import detokenizers_of
from tests.support.tiny_tokenizer import byte_fallback_tokenizer, byte_level_tokenizer, word_piece_tokenizer

EOS_ID = 1
MAKERS = [byte_level_tokenizer, byte_fallback_tokenizer, word_piece_tokenizer]
TEXTS = [
    "Once upon a time",
    "漢字と仮名 🙂🙃 naïve",
    "👩‍👩‍👧‍👦 zero width joiners",
    "tabs\tand\nnewlines  and   spaces ",
    "a �real� replacement character",
    "hellos doing. don't, 漢",
]


def deltas_of(detokenizer: Detokenizer, token_ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.finish()]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("text", TEXTS)
def test_real_text_comes_out_whole(maker: type[Tokenizer], text: str) -> None:
    tokenizer: Tokenizer = maker()
    token_ids = tokenizer.encode(text, add_special_tokens=False).ids
    deltas = deltas_of(detokenizers_of(tokenizer)(()), token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)
    if "�" not in text:
        assert not any("�" in delta for delta in deltas)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("seed", range(40))
def test_random_tokens_come_out_as_they_decode(maker: type[Tokenizer], seed: int) -> None:
    """Random ids give broken characters, bytes that never fit, special tokens in between and ids without a token."""
    tokenizer: Tokenizer = maker()
    rng = random.Random(seed)
    bound = tokenizer.get_vocab_size() + 3
    for length in (1, 2, 3, 5, 40):
        token_ids = [rng.randrange(bound) for _ in range(length)]
        deltas = deltas_of(detokenizers_of(tokenizer)(()), token_ids)
        assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=True), token_ids


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_decode_as_the_tokenizer_decodes_them(seed: int) -> None:
    """The incremental UTF-8 decoder replaces what is broken exactly as the tokenizer's does."""
    tokenizer = byte_level_tokenizer()
    rng = random.Random(seed)
    by_byte = {byte_level_bytes(token): index for token, index in tokenizer.get_vocab().items() if len(token) == 1}
    interesting = [0x41, 0x7F, 0x80, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE6, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF, 0x90, 0x9F]
    token_ids = [by_byte[bytes([rng.choice(interesting)])] for _ in range(200)]
    deltas = deltas_of(detokenizers_of(tokenizer)(()), token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("maker", MAKERS)
def test_plain_words_come_at_once(maker: type[Tokenizer]) -> None:
    """Nothing is held back without need: each token of plain text gives its text when it is fed."""
    tokenizer: Tokenizer = maker()
    token_ids = tokenizer.encode("hello world" if maker is word_piece_tokenizer else " Once upon the").ids[1:]
    detokenizer = detokenizers_of(tokenizer)(())
    assert all(detokenizer.feed(token_id) for token_id in token_ids)
    assert detokenizer.finish() == ""


def test_output_joins_on_to_the_prompt() -> None:
    """A leading space that a lone decode would strip is kept behind a prompt."""
    tokenizer = byte_fallback_tokenizer()
    once, upon = tokenizer.token_to_id("▁Once"), tokenizer.token_to_id("▁upon")
    assert deltas_of(detokenizers_of(tokenizer)((once,)), [upon]) == [" upon", ""]
    assert deltas_of(detokenizers_of(tokenizer)(()), [upon]) == ["upon", ""]


def test_a_character_behind_those_of_the_prompt_is_read_by_itself() -> None:
    """Raw bytes in a row are read as a whole: neither half of a character before them, nor half of one, may spoil them.

    The prompt's tail begins where it may; a special token, as that which ends an instruction, is no text between.
    """
    tokenizer = byte_fallback_tokenizer()
    smile = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    for tail in (smile[2:] + smile, [*smile[3:], *smile, EOS_ID], [EOS_ID, *smile[1:], 7]):
        assert "".join(deltas_of(detokenizers_of(tokenizer)(tuple(tail)), smile)) == "🙂"
        assert "".join(deltas_of(detokenizers_of(tokenizer)(tuple(tail)), smile[:3])) == 3 * "\N{REPLACEMENT CHARACTER}"
    assert "".join(deltas_of(detokenizers_of(tokenizer)(tuple(smile[:2])), smile[2:])) == "🙂"  # the prompt began it


def test_a_run_of_special_tokens_costs_nothing() -> None:
    tokenizer = byte_fallback_tokenizer()
    detokenizer = detokenizers_of(tokenizer)(())
    assert [detokenizer.feed(1) for _ in range(1000)] == [""] * 1000


def test_kinds_of_decoders() -> None:
    assert is_byte_level({"type": "ByteLevel"})
    assert is_byte_level({"type": "Sequence", "decoders": [{"type": "ByteLevel"}]})
    assert not is_byte_level({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]})
    assert byte_level_bytes("Ġa") == b" a"
    assert byte_level_bytes("<tool> ✓") == "<tool> ✓".encode()
