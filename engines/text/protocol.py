"""``Text``: what the daemon needs to turn text into token ids and back."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from engines.text.incremental import TextDelta
from engines.text.wire import About, ChatOptions

__all__ = ["PROMPT_TAIL_TOKENS", "Text", "TextDelta", "TextFeed"]

PROMPT_TAIL_TOKENS = 6  # enough context for any decoder to join the output on to the prompt


class TextFeed(Protocol):
    """The text of one output. Closing it, on every path, forgets it."""

    async def feed(self, token_ids: tuple[int, ...], *, final: bool = False) -> TextDelta:
        """Take the next output tokens and return the text that can be shown now. One call at a time.

        Nothing may be fed after a final feed or a stop hit.

        Raises:
            TextProcessDied, TextClosed
        """

    def close(self) -> None: ...


class Text(Protocol):
    """Tokenizer and chat template of one model."""

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Raises: TextRefused, TextProcessDied, TextClosed."""

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: ChatOptions = ChatOptions(),
    ) -> tuple[int, ...]:
        """Render the chat template, by default up to where the answer begins. Raises: as ``encode``."""

    async def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones included. Raises: as ``encode``."""

    async def pieces(self, token_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token by itself, special ones as they are written. Raises: as ``encode``."""

    def open(
        self,
        *,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        marks: tuple[str, ...] = (),
    ) -> TextFeed:
        """Begin the text of one output. Stop strings are not looked for in that of its first ``min_tokens`` tokens.

        ``marks``: added tokens that are text in this output, also if they are special.
        """

    @property
    def about(self) -> About:
        """What else is to be known of the tokenizer."""

    @property
    def failure(self) -> str | None:
        """Why text can no longer be served, None while it can."""
