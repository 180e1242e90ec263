"""One stream of text: token ids in, certain text out, cut at stop strings."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from engines.text.detokenize import Detokenizer
from engines.text.stops import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that can be shown now.

    ``tokens_consumed`` counts the output tokens of the stream so far; with ``stop_hit`` those up to and with the one
    that completed the stop string, which is ``stop``. ``tokens_shown`` counts those of them whose text has been given
    as a whole.
    """

    text: str
    stop_hit: bool
    tokens_consumed: int
    tokens_shown: int = field(default=0, compare=False)
    stop: str | None = field(default=None, compare=False)


class TextStream:
    """What a stream gives depends on its tokens alone, not on how they were split into feeds.

    Args:
        detokenizer, stops: Fresh, for this stream only.
        token_ids, characters_sent: What a stream that this one replaces was fed, and how much text it gave for it.
        min_tokens: A stop string that ends within the text of so many tokens is none.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        *,
        token_ids: Iterable[int] = (),
        characters_sent: int = 0,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._tokens_consumed = 0
        self._stop_hit = False
        self._min_tokens = min_tokens
        self._made = self._shown = self._tokens_shown = 0  # characters of all tokens, and of what has been given
        self._ends: deque[int] = deque()  # for each token that has not been given as a whole, what it ends at
        self._owed = ""
        self._owed = self.feed(token_ids).text[characters_sent:]

    def feed(self, token_ids: Iterable[int], *, final: bool = False) -> TextDelta:
        """Take output tokens in order. After a stop hit further ones are ignored."""
        parts: list[str] = []
        for token_id in token_ids:
            if self._stop_hit:
                break
            self._tokens_consumed += 1
            parts.append(self._match(self._detokenizer.feed(token_id)))
            self._ends.append(self._made + self._detokenizer.is_pending)  # its rest is shown with what comes next
        if final and not self._stop_hit:
            parts.append(self._match(self._detokenizer.finish()))
            if not self._stop_hit:
                parts.append(self._stops.finish())
        given = "".join(parts)
        self._shown += len(given)
        is_whole = final and not self._stop_hit
        while self._ends and (is_whole or self._ends[0] <= self._shown):
            self._ends.popleft()
            self._tokens_shown += 1
        text, self._owed = self._owed + given, ""
        return TextDelta(
            text=text,
            stop_hit=self._stop_hit,
            tokens_consumed=self._tokens_consumed,
            tokens_shown=self._tokens_shown,
            stop=self._stops.met,
        )

    def _match(self, text: str) -> str:
        self._made += len(text)
        if not text:
            return ""
        shown, self._stop_hit = self._stops.feed(text, counts=self._tokens_consumed > self._min_tokens)
        return shown
