"""What vLLM writes, understood: level, process and message of a log line, and what a start is doing. Pure.

vLLM's format: ``(EngineCore pid=7) INFO 10-21 12:01:02 [core.py:111] message``. Python's warnings and tracebacks come
as plain lines.
"""

import re
from typing import Final

from engines.served.logs import LogDialect, LogLine

_LINE: Final = re.compile(
    r"(?:\((?P<process>[^()]*?) pid=\d+\)\s*)?"
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+"
    r"(?:\[[^\]]*\]\s*)?(?P<message>.*)"
)
_PREFIXED: Final = re.compile(r"\((?P<process>[^()]*?) pid=\d+\)\s*(?P<message>.*)")
_COLOR: Final = re.compile(r"\x1b\[[0-9;]*m")
_ROUTE: Final = re.compile(r"(Available routes are:|Route: /)")
# What people want to know of a start, by what vLLM says then; the first that fits.
_STAGES: Final = (
    (r"non-default args|Overriding ", None),  # they quote settings, whose names say anything
    (r"vLLM API server version|^\S*\s*version +\d|█", "starting the API server"),
    (r"Resolved architecture|Using max model len", "reading the model's configuration"),
    (r"Initializing a V1 LLM engine", "starting the engine core"),
    (r"world_size=\d+ rank=|is assigned as DP rank", "starting workers"),
    (r"Compiling|torch\.compile takes|Dynamo bytecode|compile range", "compiling"),
    (r"Capturing CUDA graph", "capturing CUDA graphs"),
    (r"Starting to load model|Loading safetensors|Loading weights|Loading pt", "loading weights"),
    (r"KV cache size:|for KV cache", "allocating the KV cache"),
    (r"[Ww]arming up", "warming up"),
    (r"Supported tasks:|Starting vLLM server", "starting the server"),
)
_COMPILED: Final = tuple((re.compile(pattern), words) for pattern, words in _STAGES)
_SLOW: Final = ("compiling", "capturing CUDA graphs", "loading weights", "warming up")


def parse_line(line: str) -> LogLine:
    """Return what a line says. A line that vLLM's logger did not write is kept whole, as information."""
    plain = _COLOR.sub("", line).rstrip()
    if found := _LINE.match(plain):
        message = found["message"]
        level = "debug" if _ROUTE.match(message) else found["level"].lower()  # 40 routes are no news
        return LogLine(level=level, process=found["process"] or "", message=message)
    if found := _PREFIXED.match(plain):
        return LogLine(level="info", process=found["process"], message=found["message"])
    return LogLine(level="info", process="", message=plain)


def progress_of(line: LogLine) -> str | None:
    """Return what the start is doing, in words, None where the line does not tell."""
    if line.level != "info":
        return None
    return next((words for pattern, words in _COMPILED if pattern.search(line.message)), None)


def takes_long(progress: str) -> bool:
    """Return whether this may rightly take minutes without a sign of life."""
    return progress in _SLOW


DIALECT: Final = LogDialect(parse=parse_line, progress=progress_of, takes_long=takes_long)
