"""One answer as server-sent events: from chunks of bytes to what is measured. Plain and synchronous."""

import json
from typing import Any

_LONGEST_LINE_BYTES = 16 << 20


class BrokenStream(Exception):
    """What came is not the stream that was asked for; the message says how."""


class AnswerStream:
    """Takes an answer in as it comes.

    A chunk of text counts as tokens until the server says how many there were (``usage``): several tokens may come in
    one event, and a token without text of its own in none.
    """

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.is_done = False
        self._events = 0
        self._usage: int | None = None
        self._rest = b""

    @property
    def output_tokens(self) -> int:
        return self._events if self._usage is None else self._usage

    def feed(self, data: bytes, *, now_s: float) -> None:
        """Take in what came at ``now_s``. Raises: BrokenStream."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LONGEST_LINE_BYTES:
            raise BrokenStream("a line without end")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)

    def finish(self) -> None:
        """The connection has ended. Raises: BrokenStream, if the answer has not."""
        if not self.is_done:
            raise BrokenStream(f"the stream broke off after {self._events} events")
        if self.first_s is None:
            raise BrokenStream("the answer has no token")

    def _event(self, payload: bytes, now_s: float) -> None:
        if payload == b"[DONE]":
            self.is_done = True
            return
        try:
            event: Any = json.loads(payload)
            if not isinstance(event, dict):
                raise BrokenStream(f"an event that is no object: {payload[:80]!r}")
            self._take(event, now_s)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise BrokenStream(f"an event that cannot be read: {payload[:80]!r} ({error})") from None

    def _take(self, event: dict[str, Any], now_s: float) -> None:
        if event.get("error"):
            error = event["error"]
            raise BrokenStream(f"the server says: {error.get('message', error) if isinstance(error, dict) else error}")
        if event.get("usage"):
            self._usage = int(event["usage"]["completion_tokens"])
        for choice in event.get("choices") or ():
            if _has_token(choice):
                self._events += 1
                self.first_s = now_s if self.first_s is None else self.first_s
                self.last_s = now_s


def _has_token(choice: dict[str, Any]) -> bool:
    """Return whether a chunk brings something: the one that only names the role does not."""
    delta = choice.get("delta") or {}
    return bool(
        choice.get("text") or delta.get("content") or delta.get("reasoning_content") or choice.get("finish_reason")
    )
