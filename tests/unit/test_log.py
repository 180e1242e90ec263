"""Log lines: for people or for programs, and events with stable names and fields."""

import asyncio
import io
import json
from collections.abc import Iterator

import pytest
import structlog
from structlog.testing import capture_logs

from flexpiped import log_events
from flexpiped.log import configure_logging, of_model
from flexpiped.settings import LogFormat, LogLevel, LogSettings


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def logged(settings: LogSettings) -> str:
    out = io.StringIO()
    configure_logging(settings, stream=out)
    log_events.config_unchanged(file="my.toml")
    log_events.engine_failed(reason="out of memory")
    return out.getvalue()


def test_a_pipe_gets_one_json_object_a_line() -> None:
    first, second = map(json.loads, logged(LogSettings()).splitlines())

    assert (first["event"], first["level"], first["file"]) == ("configuration unchanged", "info", "my.toml")
    assert (second["event"], second["reason"]) == ("engine failed for good", "out of memory")
    assert first["timestamp"].endswith("Z")


async def test_tasks_that_begin_in_the_scope_of_a_model_bear_its_name() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(), stream=out)

    async def later() -> None:
        await asyncio.sleep(1.0)
        log_events.engine_failed(reason="out of memory")

    with of_model("a"):
        task = asyncio.create_task(later())
    with of_model(""):
        log_events.engine_failed(reason="out of date")
    await task
    assert [json.loads(line).get("model") for line in out.getvalue().splitlines()] == [None, "a"]


def test_a_console_gets_lines_for_people() -> None:
    text = logged(LogSettings(format=LogFormat.CONSOLE))

    assert "engine failed for good" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.CONSOLE])
def test_a_traceback_shows_where_and_no_values(form: LogFormat) -> None:
    """Local variables may hold keys, prompts and completions."""
    out = io.StringIO()
    configure_logging(LogSettings(format=form), stream=out)
    prompt = "prompt" * 2
    try:
        fail_over(prompt)
    except ZeroDivisionError as error:
        log_events.background_task_failed(task="auto", error=error)

    assert "background task failed" in out.getvalue()
    assert "fail_over" in out.getvalue()
    assert "promptprompt" not in out.getvalue()


def fail_over(prompt: str) -> None:
    _ = len(prompt) / 0


def test_what_is_below_the_level_is_left_out() -> None:
    assert len(logged(LogSettings(level=LogLevel.ERROR)).splitlines()) == 1


def test_events_are_whole() -> None:
    with capture_logs() as logs:
        log_events.daemon_ready(start_s=2.40049, http="http://127.0.0.1:8100/v1", admin="/run/admin.sock")
        log_events.config_needs_restart(file="my.toml", keys=("stages",))

    assert logs == [
        {
            "event": "daemon ready",
            "log_level": "info",
            "start_s": 2.4,
            "http": "http://127.0.0.1:8100/v1",
            "admin": "/run/admin.sock",
        },
        {
            "event": "configuration changed, restart to apply",
            "log_level": "warning",
            "file": "my.toml",
            "keys": ["stages"],
        },
    ]
