"""Logging: structlog to standard error, for people on a console or as one JSON object a line."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

import structlog

from flexpiped.settings import LogFormat, LogSettings


def configure_logging(settings: LogSettings, *, stream: TextIO | None = None) -> None:
    """Send the log of this process to ``stream`` (standard error by default), and libraries' warnings with it."""
    stream = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.level.value.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *_renderers(settings.format, is_terminal=stream.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=stream, level=max(level, logging.WARNING))


def of_model(name: str) -> AbstractContextManager[None]:
    """Return a scope whose log lines bear the model's name, and those of tasks that begin there; empty: they do not."""
    return structlog.contextvars.bound_contextvars(model=name) if name else nullcontext()


def _renderers(chosen: LogFormat, *, is_terminal: bool) -> list[structlog.typing.Processor]:
    """Return what makes lines of events. Tracebacks go without local variables, which may hold what clients wrote."""
    if chosen is LogFormat.CONSOLE or (chosen is LogFormat.AUTO and is_terminal):
        return [
            structlog.dev.ConsoleRenderer(colors=is_terminal, exception_formatter=structlog.dev.plain_traceback),
        ]
    without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
    return [structlog.processors.ExceptionRenderer(without_locals), structlog.processors.JSONRenderer()]
