"""How things are written on a terminal: durations, bars, tables, colour. Pure functions."""

import textwrap
from collections.abc import Sequence
from enum import Enum
from typing import Final

WIDTH: Final = 80  # columns of the terminal that all is written for
BAR_WIDTH: Final = 20
NO_BREAK: Final = "\N{NO-BREAK SPACE}"  # keeps words on one line where text is wrapped; written as a space


class Colour(Enum):
    RED = "31"
    GREEN = "32"
    YELLOW = "33"


class Paint:
    """Colours words where that is wanted; they say the same without."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    def __call__(self, text: str, colour: Colour) -> str:
        return f"\x1b[{colour.value}m{text}\x1b[0m" if self._enabled else text


PLAIN = Paint(enabled=False)


def format_duration(duration_s: float) -> str:
    """Return a short duration with a unit and two or three digits: ``3.1 ms``, ``38 ms``, ``0.11 s``, ``2.4 s``."""
    if duration_s < 0.0995:
        value_ms = duration_s * 1000
        return f"{value_ms:.1f} ms" if value_ms < 9.95 else f"{value_ms:.0f} ms"
    if duration_s < 0.995:
        return f"{duration_s:.2f} s"
    return f"{duration_s:.1f} s" if duration_s < 60 else format_age(duration_s)


def format_latency(duration_s: float) -> str:
    """Return a latency in milliseconds up to ten seconds: ``4.1 ms``, ``812 ms``."""
    value_ms = duration_s * 1000
    if value_ms < 9.95:
        return f"{value_ms:.1f} ms"
    return f"{value_ms:.0f} ms" if value_ms < 9_999.5 else f"{duration_s:.0f} s"


def format_age(duration_s: float) -> str:
    """Return a long duration as its two largest units: ``12 s``, ``2 min``, ``3 h 12 min``, ``4 d 1 h``."""
    seconds = max(0, int(duration_s))
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if hours < 1:
        return f"{minutes} min"
    if days < 1:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def bar(part: float, whole: float, *, width: int = BAR_WIDTH) -> str:
    """Return a bar such as ``######..............``. Anything above nothing shows, and only all of it fills it."""
    if whole <= 0 or part <= 0:
        return "." * width
    filled = min(max(1, int(part / whole * width)), width)
    return "#" * filled + "." * (width - filled)


def table(rows: Sequence[Sequence[str]], *, indent: str = "  ", gap: str = "   ") -> list[str]:
    """Return the rows with their columns aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        (indent + gap.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    ]


def wrapped(text: str, *, head: str = "", width: int = WIDTH) -> list[str]:
    """Return ``text`` behind ``head`` in lines that fit, all but the first indented as far as the first begins.

    Nothing is broken at a hyphen, which most are of UUIDs, nor at ``NO_BREAK``.
    """
    lines = textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines] or [head.rstrip()]
