"""Stop strings in a stream of text."""


class StopMatcher:
    """Passes text on up to the first stop string and never shows part of one.

    Text is cut before the stop string, or behind it with ``include_stop``. The one that ends first counts, and of those
    that end together the one listed first (as in vLLM), so that it does not matter how the text is split.
    """

    def __init__(self, stop: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""  # may be the beginning of a stop string
        self.met: str | None = None  # the stop string that ended the text

    def feed(self, text: str, *, counts: bool = True) -> tuple[str, bool]:
        """Return the text that can be shown now, and whether a stop string has been met.

        Without ``counts`` none is met that ends in ``text``; one that begins in it may be met later.
        """
        if not self._stop:
            return text, False
        num_held, text = len(self._held), self._held + text
        ends = [
            (at + len(stop), order)
            for order, stop in enumerate(self._stop)
            if counts and (at := text.find(stop, max(num_held - len(stop) + 1, 0))) >= 0
        ]
        if ends:
            end, order = min(ends)
            self.met = self._stop[order]
            return text[: end if self._include_stop else end - len(self.met)], True
        keep = max(longest_beginning(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what was held back: the end came before the stop string did."""
        held, self._held = self._held, ""
        return held


def longest_beginning(text: str, stop: str) -> int:
    """Return the length of the longest suffix of ``text`` that begins ``stop`` without completing it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
