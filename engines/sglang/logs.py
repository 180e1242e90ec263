"""What SGLang writes, understood: level, process and message of a log line, and what a start is doing. Pure.

SGLang's format: ``[2026-11-24 17:40:40 PP1] message``, without a level; with ``SGLANG_LOG_MS``, ``17:40:40.123``. What
its schedulers report before they end is one line with a traceback after it; Python's warnings and tracebacks come as
plain lines.
"""

import re
from typing import Final

from engines.served.logs import LogDialect, LogLine

_LINE: Final = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?(?: (?P<process>[^\]]+))?\] (?P<message>.*)")
_UVICORN: Final = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+(?P<message>.*)")
_COLOR: Final = re.compile(r"\x1b\[[0-9;]*m")
_ERROR: Final = re.compile(r"hit an exception|SIGQUIT received|crashed|[Ff]ailed to|died")
_WARNING: Final = re.compile(r"^\S+:\d+: \w*Warning:|[Dd]eprecat|incompatible|Beware|warning", re.IGNORECASE)
_KEY: Final = re.compile(r"""(api_key['"]?\s*[=:]\s*)('[^']*'|"[^"]*"|[^\s,)}]+)""")
_DEBUG: Final = re.compile(
    r"^server_args=|^Ignore import error|HTTP/1\.1\" 200|^Loaded plugin|^Available plugins|^  - "
)
# What people want to know of a start, by what SGLang says then; the first that fits.
_STAGES: Final = (
    (r"^server_args=", "reading the model's configuration"),
    (r"Init (parallel|torch distributed) begin", "starting ranks"),
    (r"Load weight begin|Loading safetensors|loading shards", "loading weights"),
    (r"KV Cache is allocated|Memory pool end", "allocating the KV cache"),
    (r"Capture (cuda|decode|prefill).*graph.* begin", "capturing CUDA graphs"),
    (r"max_total_num_tokens=", "starting the server"),
)
_COMPILED: Final = tuple((re.compile(pattern), words) for pattern, words in _STAGES)
_SLOW: Final = ("loading weights", "capturing CUDA graphs")


def parse_line(line: str) -> LogLine:
    """Return what a line says, without keys. A line that SGLang's logger did not write is kept, as information."""
    plain = _KEY.sub(r"\1***", _COLOR.sub("", line).rstrip())
    found = _LINE.match(plain)
    process, message = (found["process"] or "", found["message"]) if found else ("", plain)
    if told := _UVICORN.match(message):
        message = told["message"]
        return LogLine(level="debug" if _DEBUG.search(message) else told["level"].lower(), process="", message=message)
    return LogLine(level=_level_of(message, logged=found is not None), process=process, message=message)


def progress_of(line: LogLine) -> str | None:
    """Return what the start is doing, in words, None where the line does not tell."""
    return next((words for pattern, words in _COMPILED if pattern.search(line.message)), None)


def takes_long(progress: str) -> bool:
    """Return whether this may rightly take minutes without a sign of life."""
    return progress in _SLOW


def _level_of(message: str, *, logged: bool) -> str:
    """Return a level for a line that names none: what it is about decides."""
    if _DEBUG.search(message):
        return "debug"
    if logged and _ERROR.search(message):
        return "error"
    return "warning" if _WARNING.search(message) else "info"


DIALECT: Final = LogDialect(parse=parse_line, progress=progress_of, takes_long=takes_long)
