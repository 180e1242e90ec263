"""What the daemon says on its standard output when it starts: what is served where, and what to type next."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO

from flexpiped.flexctl.text import format_duration

QUIET_START_S: Final = 2.0
_CURL: Final = (
    "curl -N {api}/completions -H 'content-type: application/json' "
    '-d \'{{{model}"prompt": "Once", "max_tokens": 200, "stream": true}}\''
)


class Banner:
    """Writes to ``out``; None writes nothing (a service manager has the log and the status text).

    Args:
        command: How ``flexctl`` is called from here.
    """

    def __init__(self, out: TextIO | None, *, command: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._command = command
        self._clock = clock
        self._started_s = clock()
        self._last = ""

    @property
    def is_read_live(self) -> bool:
        """Whether somebody reads it on a terminal, so that the log need not say the same."""
        return self._out is not None and self._out.isatty()

    @property
    def elapsed_s(self) -> float:
        """Since the daemon started."""
        return self._clock() - self._started_s

    def starting(self, *, version: str, engine: str, devices: str, model: str) -> None:
        self._write(f"flexpiped {version}   {engine} engine, {devices}, model {model}")

    def progress(self, message: str) -> None:
        """Take what a starting engine says; it is shown once the start takes longer than one waits without a word."""
        self._last = message
        if self.elapsed_s >= QUIET_START_S:
            self.show_progress()

    def show_progress(self) -> None:
        """Show what was said last, if it was not shown yet."""
        if self._last:
            self._write(f"  {format_duration(self.elapsed_s):>6}  {self._last}")
            self._last = ""

    def ready(self, *, facts: str, api_url: str, admin: Path, next_stages: int, model: str = "") -> None:
        """Say that requests are served, and what to try; ``model`` is named where there are several."""
        self._last = ""
        self._write(f"ready in {format_duration(self.elapsed_s)}    API {api_url}    admin {admin}")
        self._write(f"serving {facts}")
        named, which = (f'"model": "{model}", ', f" --model {model}") if model else ("", "")
        self._write(f"try:  {_CURL.format(api=api_url, model=named)}")
        self._write(f"      {self._command} status")
        self._write(
            f"      {self._command} rebalance{which} --stages {next_stages} --wait      (while the curl is running)"
        )

    def say(self, line: str) -> None:
        self._write(line)

    def _write(self, line: str) -> None:
        if self._out is not None:
            print(line, file=self._out, flush=True)


def flexctl_command(executable: Path, *, folder: Path, socket: Path | None) -> str:
    """Return how to call the ``flexctl`` beside ``executable`` from ``folder``; ``socket`` where it must be named."""
    command = executable.parent / "flexctl"
    if not command.is_file():
        words = "python -m flexpiped.flexctl"
    else:
        words = str(command.relative_to(folder) if command.is_relative_to(folder) else command)
    return words if socket is None else f"{words} --socket {socket}"
