"""Traces from files."""

from pathlib import Path

from planner.errors import InvalidTrace
from planner.traces import Trace, parse_trace


def read_trace(path: Path) -> Trace:
    """Return the requests of a trace file, Azure CSV or Mooncake JSON lines.

    Raises:
        InvalidTrace: It cannot be read; the message names the file, and the line where there is one.
    """
    try:
        return parse_trace(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidTrace(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidTrace(f"{path}: not UTF-8 text") from None
    except InvalidTrace as error:
        raise InvalidTrace(f"{path}: {error}") from None
