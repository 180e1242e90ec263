"""Where lines go: a terminal, on which the last line may be rewritten, or a pipe, which gets whole lines only."""

import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TextIO

from flexpiped.flexctl.text import Paint


class OutputLost(Exception):
    """What was to be shown cannot be written; the message says why."""


class Screen:
    """Writes lines to ``out``. The live line is shown on a terminal only, below the lines written so far.

    Its methods raise ``OutputLost`` where they cannot write, and ``BrokenPipeError`` where nobody reads any more.
    """

    def __init__(self, out: TextIO, *, environment: Mapping[str, str]) -> None:
        self._out = out
        self._live = out.isatty() and environment.get("TERM", "") != "dumb"
        self._shown = False
        self.paint = Paint(enabled=self._live and not environment.get("NO_COLOR"))

    def write(self, lines: Sequence[str]) -> None:
        """Write whole lines for good."""
        self._put("".join([self._cleared(), *(f"{line}\n" for line in lines)]))

    def live(self, line: str) -> None:
        """Show ``line`` until the next call; in a pipe nothing is written."""
        if not self._live:
            return
        self._put(self._cleared() + line[: shutil.get_terminal_size().columns - 1])
        self._shown = bool(line)

    def _cleared(self) -> str:
        """Return what takes the live line away."""
        was_shown, self._shown = self._shown, False
        return "\r\x1b[K" if was_shown else ""

    def _put(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputLost(f"the output cannot be written: {error.strerror}") from error


def standard_output() -> TextIO:
    """Return where lines go; the null device where the caller has closed that.

    What its encoding has no characters for is shown escaped, as on stderr: names of files and models may be anything.
    """
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False)  # open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def silence_closed_pipe(out: TextIO) -> None:
    """Have the interpreter's last flush go nowhere, after the reader of ``out`` has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
