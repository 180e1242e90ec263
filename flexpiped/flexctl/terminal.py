"""Where lines go: a terminal, on which the last line may be rewritten, or a pipe, which gets whole lines only."""

import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TextIO

from flexpiped.flexctl.text import Paint


class Screen:
    """Writes lines to ``out``. The live line is shown on a terminal only, below the lines written so far."""

    def __init__(self, out: TextIO, *, environment: Mapping[str, str]) -> None:
        self._out = out
        self._live = out.isatty() and environment.get("TERM", "") != "dumb"
        self._shown = False
        self.paint = Paint(enabled=self._live and not environment.get("NO_COLOR"))

    def write(self, lines: Sequence[str]) -> None:
        """Write whole lines for good."""
        self._clear()
        for line in lines:
            self._out.write(line + "\n")
        self._out.flush()

    def live(self, line: str) -> None:
        """Show ``line`` until the next call; in a pipe nothing is written."""
        if not self._live:
            return
        self._clear()
        self._out.write(line[: shutil.get_terminal_size().columns - 1])
        self._out.flush()
        self._shown = bool(line)

    def _clear(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._shown = False


def silence_closed_pipe(out: TextIO) -> None:
    """Have the interpreter's last flush go nowhere, after the reader of ``out`` has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
