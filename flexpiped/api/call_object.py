"""One call of a tool as a JSON object that comes piece by piece."""

import json
import re
from typing import Final

_HEAD: Final = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_FIRST_KEY: Final = re.compile(r'\{\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)
_KEYS: Final = frozenset({"name", "arguments", "parameters", "id", "type"})  # that an object of a call begins with


class ObjectOfCall:
    """One JSON object as it comes: where it ends, and as early as that is known what it calls.

    With a ``name`` it is the arguments alone.
    """

    def __init__(self, *, name: str | None = None) -> None:
        self.text = ""
        self.name = name  # once it is known that the arguments come next
        self._is_alone = name is not None
        self.index: int | None = None
        self.is_whole = False
        self._depth = 0
        self._is_string = self._is_escaped = False
        self._arguments_at = -1
        self._arguments_end = -1
        self._given = 0  # of the text, as arguments

    @property
    def is_of_others(self) -> bool:
        """Whether it begins as no call does."""
        first = _FIRST_KEY.match(self.text)
        return self.name is None and first is not None and first.group(1) not in _KEYS

    def take(self, text: str) -> int:
        """Take what of ``text`` belongs to the object; return how much that is."""
        start = len(self.text)
        closings = []
        for at, character in enumerate(text, start=start):
            if self._passes(character):
                closings.append(at)
            if self.is_whole:
                break
        self.text += text[: at + 1 - start] if text else ""
        if self.name is None and (head := _HEAD.match(self.text)) is not None:
            self.name = json.loads(head.group(1), strict=False)
            self._arguments_at = self._given = head.end()
        if self.name is not None and self._arguments_end < 0 and not self._is_alone:
            self._arguments_end = next((each + 1 for each in closings if each >= self._arguments_at), -1)
        return len(self.text) - start

    def new_arguments(self) -> str:
        """Return what has come of the arguments since the last time."""
        end = len(self.text) if self._arguments_end < 0 else self._arguments_end
        new, self._given = self.text[self._given : end], max(end, self._given)
        return new

    def _passes(self, character: str) -> bool:
        """Go over one character; True: it closes what is directly within the object."""
        if self._is_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_string = False
        elif character == '"':
            self._is_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_whole = self._depth == 0
            return self._depth == 1
        return False
