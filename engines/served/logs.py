"""What an engine writes: lines understood by its own dialect, and what it should be remembered by. Pure."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

RECENT_S: Final = 30.0  # trouble before that was survived
_TROUBLE: Final = re.compile(r"^(?P<error>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)): (?P<reason>.+)")
_REFUSED: Final = re.compile(r"^[\w. -]+: error: ")  # argparse
_DETAIL: Final = re.compile(
    r"Value error, (?P<reason>.+?)(?: \[type=.*)?$"
)  # pydantic's second line says what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line. ``level`` is structlog's name for it; ``process`` is empty where the line does not say."""

    level: str
    process: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDialect:
    """How one engine writes: a line understood, what a start is doing then, and whether that may take minutes."""

    parse: Callable[[str], LogLine]
    progress: Callable[[LogLine], str | None]
    takes_long: Callable[[str], bool]


class LastWords:
    """What an engine that ends should be remembered by: the first error of the last trouble, else its last error line.

    Once the engine was ready, trouble is forgotten after ``RECENT_S``: the engine has survived it.
    """

    def __init__(self) -> None:
        self._cause = self._last = ""
        self._cause_s = self._last_s = 0.0
        self._is_ready = False

    def ready(self) -> None:
        """The engine has started."""
        self._is_ready = True

    def note(self, line: LogLine, *, now_s: float) -> None:
        """Take in one line."""
        self._forget(now_s)
        message = line.message.strip()
        if found := _TROUBLE.match(message):
            # later ones are of the processes that waited for the one that failed: "Engine core initialization failed"
            if not self._cause or "See root cause" in self._cause:
                self._blame(f"{found['error'].rpartition('.')[2]}: {found['reason']}", now_s)
        elif (found := _DETAIL.match(message)) and "validation error" in self._cause:
            self._blame(f"ValueError: {found['reason']}", now_s)
        elif line.level in ("error", "critical") and message and not message.startswith(("Traceback", "File ", "  ")):
            self._last, self._last_s = message, now_s
        elif _REFUSED.match(message):
            self._blame(message, now_s)

    def said(self, *, now_s: float) -> str:
        """Return them; nothing where there was no trouble."""
        self._forget(now_s)
        return self._cause or self._last

    def _blame(self, cause: str, now_s: float) -> None:
        self._cause, self._cause_s = cause, now_s

    def _forget(self, now_s: float) -> None:
        if self._is_ready and now_s - self._cause_s > RECENT_S:
            self._cause = ""
        if self._is_ready and now_s - self._last_s > RECENT_S:
            self._last = ""
