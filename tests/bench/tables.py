"""What the programs print: progress on stderr, aligned tables and verdicts on stdout, raw figures as JSON."""

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STARTED_S = time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A figure and what it has to be. A ``limit`` of None is printed without a verdict."""

    what: str
    value: float
    limit: float | None
    at_most: bool = False  # else at least
    unit: str = "x"

    @property
    def holds(self) -> bool | None:
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def was_measured(self) -> bool:
        """Whether everything it compares took part."""
        return not math.isnan(self.value)

    def cells(self) -> list[str]:
        """Return the bound as a row of a table."""
        wanted = "" if self.limit is None else f"{'<=' if self.at_most else '>='} {self.limit:g} {self.unit}"
        verdict = {True: "ok", False: "MISSED", None: "(printed)"}[self.holds]
        return [self.what, f"{self.value:.3g} {self.unit}", wanted, verdict]


def say(message: str) -> None:
    """Write a line of progress."""
    print(f"{time.monotonic() - _STARTED_S:7.1f} s  {message}", file=sys.stderr, flush=True)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(f"\n{title}")
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("  " + "  ".join(cells).rstrip())


def verdicts(bounds: Sequence[Bound]) -> None:
    """Print every bound that was measured, with its ratio."""
    rows = [bound.cells() for bound in bounds if bound.was_measured]
    table("verdicts", ["figure", "measured", "bound", ""], rows)
    sys.stdout.flush()


def ms(seconds: float) -> str:
    """Return a duration in milliseconds."""
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.2f}"


def times(ratio: float) -> str:
    """Return a ratio."""
    return "-" if math.isnan(ratio) else f"{ratio:.2f} x"


def mib(size_bytes: float) -> str:
    """Return a size in MiB."""
    return f"{size_bytes / 2**20:.1f}"


def write_json(path: Path | None, figures: dict[str, Any], bounds: Sequence[Bound]) -> None:
    """Write the raw figures, with the bounds, if a file was asked for."""
    if path is None:
        return
    wire = [
        {"what": b.what, "value": b.value, "limit": b.limit, "unit": b.unit, "holds": b.holds}
        for b in bounds
        if b.was_measured
    ]
    path.write_text(json.dumps(_without_nan(figures | {"bounds": wire}), indent=1) + "\n")
    say(f"raw figures are in {path}")


def _without_nan(value: Any) -> Any:
    """Return the value with None for what was not measured: JSON has no NaN."""
    match value:
        case float() if math.isnan(value):
            return None
        case dict():
            return {key: _without_nan(each) for key, each in value.items()}
        case list() | tuple():
            return [_without_nan(each) for each in value]
        case _:
            return value
