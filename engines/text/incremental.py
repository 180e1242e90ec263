"""One stream of text: token ids in, certain text out, cut at stop strings."""

from collections.abc import Iterable
from dataclasses import dataclass

from engines.text.detokenize import Detokenizer
from engines.text.stops import StopMatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that can be shown now.

    ``tokens_consumed`` counts the output tokens of the stream so far; with ``stop_hit`` those up to and with the one
    that completed the stop string.
    """

    text: str
    stop_hit: bool
    tokens_consumed: int


class TextStream:
    """What a stream gives depends on its tokens alone, not on how they were split into feeds.

    Args:
        detokenizer, stops: Fresh, for this stream only.
        token_ids, characters_sent: What a stream that this one replaces was fed, and how much text it gave for it.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopMatcher,
        *,
        token_ids: Iterable[int] = (),
        characters_sent: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._tokens_consumed = 0
        self._stop_hit = False
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
        if final and not self._stop_hit:
            parts.append(self._match(self._detokenizer.finish()))
            if not self._stop_hit:
                parts.append(self._stops.finish())
        text, self._owed = self._owed + "".join(parts), ""
        return TextDelta(text=text, stop_hit=self._stop_hit, tokens_consumed=self._tokens_consumed)

    def _match(self, text: str) -> str:
        shown, self._stop_hit = self._stops.feed(text) if text else ("", False)
        return shown
