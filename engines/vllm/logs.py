"""What vLLM writes, understood: level, process and message of a log line, and what a start is doing. Pure.

vLLM's format: ``(EngineCore pid=7) INFO 10-21 12:01:02 [core.py:111] message``. Python's warnings and tracebacks come
as plain lines.
"""

import re
from dataclasses import dataclass
from typing import Final

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
_TROUBLE: Final = re.compile(r"^(?P<error>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt)): (?P<reason>.+)")

_DETAIL: Final = re.compile(
    r"Value error, (?P<reason>.+?)(?: \[type=.*)?$"
)  # pydantic's second line says what is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line. ``level`` is structlog's name for it; ``process`` is empty where the line does not say."""

    level: str
    process: str
    message: str


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


class LastWords:
    """What a vLLM that ends should be remembered by: the first error of the last trouble, else its last error line."""

    def __init__(self) -> None:
        self._cause = ""
        self._last = ""

    def note(self, line: LogLine) -> None:
        """Take in one line."""
        message = line.message.strip()
        if found := _TROUBLE.match(message):
            # later ones are of the processes that waited for the one that failed: "Engine core initialization failed"
            if not self._cause or "See root cause" in self._cause:
                self._cause = f"{found['error'].rpartition('.')[2]}: {found['reason']}"
        elif (found := _DETAIL.match(message)) and "validation error" in self._cause:
            self._cause = f"ValueError: {found['reason']}"
        elif line.level in ("error", "critical") and message and not message.startswith(("Traceback", "File ", "  ")):
            self._last = message
        elif message.startswith("vllm: error:") or "error: unrecognized arguments" in message:
            self._cause = message

    def __str__(self) -> str:
        return self._cause or self._last
