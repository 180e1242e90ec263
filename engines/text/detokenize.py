"""Token ids to text, one at a time, exactly as the whole would decode.

Two ways, by the kind of the tokenizer's decoder:

- byte level (GPT-2, Llama 3, Qwen and others): each token stands for fixed bytes, so bytes go through an incremental
  UTF-8 decoder.
- any other (SentencePiece with byte fallback, WordPiece ...): a token's text depends on its neighbours, so a short
  window is decoded with and without the new tokens (as in vLLM and TGI), and what could still change is held back.

Both cost O(1) a token and never give part of a character.
"""

import codecs
from collections.abc import Callable, Mapping
from typing import Any, Protocol

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
_LONGEST_DISAGREEMENT = 32  # tokens after which a window that contradicts what was shown is taken as it is


class Detokenizer(Protocol):
    """The text of one output, as it becomes certain."""

    def feed(self, token_id: int) -> str:
        """Take the next token and return the text that is certain now, which may be none."""

    def finish(self) -> str:
        """Return what was held back. Nothing may be fed afterwards."""

    @property
    def is_pending(self) -> bool:
        """Whether some of what was fed is held back."""


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte behind each character of the byte-level alphabet (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; an added token outside the alphabet stands for itself."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


def is_byte_level(decoder: Mapping[str, Any]) -> bool:
    """Tell from a decoder's JSON whether every token stands for fixed bytes."""
    if decoder["type"] == "Sequence":
        return len(decoder["decoders"]) == 1 and is_byte_level(decoder["decoders"][0])
    return bool(decoder["type"] == "ByteLevel")


def is_byte_fallback(token: str) -> bool:
    """Tell whether ``token`` is one raw byte of a SentencePiece vocabulary, such as ``<0xE2>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def is_inside_character(token: str | None) -> bool:
    """Tell whether a token is one raw byte with which no character begins."""
    return token is not None and is_byte_fallback(token) and token[3] in "89AB"


class ByteLevelDetokenizer:
    """For byte-level decoders. ``bytes_of`` gives a token's bytes, none for special and unknown ones."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    @property
    def is_pending(self) -> bool:
        return bool(self._utf8.getstate()[0])


class WindowDetokenizer:
    """For all other decoders.

    Args:
        decode: Text of token ids, special ones left out.
        is_special: Whether a token never has text (special ones, ids without a token).
        is_pending: Whether the text of a run of tokens that ends with this one may still change as a whole.
        prompt_tail: The last tokens of the prompt, so that the output joins on to it (a leading space is kept).
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        is_special: Callable[[int], bool],
        is_pending: Callable[[int], bool],
        prompt_tail: tuple[int, ...] = (),
    ) -> None:
        self._decode = decode
        self._is_special = is_special
        self._is_pending = is_pending
        self._window = list(prompt_tail)
        self._shown = decode(self._window)  # text of the first `_num_shown` ids of the window
        self._num_shown = len(self._window)

    def feed(self, token_id: int) -> str:
        if self._is_special(token_id):
            return ""
        self._window.append(token_id)
        return "" if self._is_pending(token_id) else self._take(final=False)

    def finish(self) -> str:
        return self._take(final=True)

    @property
    def is_pending(self) -> bool:
        return len(self._window) > self._num_shown

    def _take(self, *, final: bool) -> str:
        text = self._decode(self._window)
        agrees = text.startswith(self._shown)
        if not agrees and not final and len(self._window) - self._num_shown < _LONGEST_DISAGREEMENT:
            return ""
        delta = text[len(self._shown) :] if agrees else self._contradicting(text)
        if delta:
            self._window = self._window[self._num_shown :]
            self._num_shown = len(self._window)
            self._shown = self._decode(self._window)
        return delta

    def _contradicting(self, text: str) -> str:
        """Return what is new where ``text``, of the whole window, does not begin with what was shown.

        A character that the prompt has begun may have been completed; else bytes have spoilt one that was right, as a
        run of raw bytes is read as a whole, and then they are read by themselves.
        """
        common = _common_prefix(text, self._shown)
        if self._shown.startswith(_NO_CHARACTER, common):
            return text[common:]
        return self._decode(self._window[self._num_shown :])


class MarkingDetokenizer:
    """For outputs in which some special tokens are text: what stands around each is detokenized by itself.

    Args:
        fresh: Makes a detokenizer for what comes next.
        marks: What these tokens read as.
    """

    def __init__(self, fresh: Callable[[], Detokenizer], marks: Mapping[int, str]) -> None:
        self._fresh = fresh
        self._marks = marks
        self._current = fresh()

    def feed(self, token_id: int) -> str:
        mark = self._marks.get(token_id)
        if mark is None:
            return self._current.feed(token_id)
        before, self._current = self._current.finish(), self._fresh()
        return before + mark

    def finish(self) -> str:
        return self._current.finish()

    @property
    def is_pending(self) -> bool:
        return self._current.is_pending


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
