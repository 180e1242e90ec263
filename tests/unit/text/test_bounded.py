"""Chat templates that do not end, or grow without end."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engines.text.bounded import Bounds, TakesTooMuch

FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set all = namespace(text='x' * 64) %}{% for i in range(40) %}{% set all.text = all.text + all.text %}"
DOUBLING += "{% endfor %}"


def rendering(template: str) -> Callable[[], str]:
    return lambda: ImmutableSandboxedEnvironment().from_string(template).render()


def test_what_takes_too_long_or_too_much_ends_and_what_comes_after_is_as_ever() -> None:
    bounds = Bounds(limit_s=0.05, limit_bytes=64 << 20)
    with pytest.raises(TakesTooMuch, match=r"longer than 0\.05 s"):
        bounds.run(rendering(FOREVER))
    with pytest.raises(TakesTooMuch, match="more than 64 MiB"):
        Bounds(limit_bytes=64 << 20).run(rendering(DOUBLING))
    assert bounds.run(rendering("{{ 6 * 7 }}")) == "42"
    assert len(bytearray(128 << 20)) == 128 << 20  # the limit of memory is gone with what it was for


def test_a_single_step_that_takes_for_ever_ends_the_process() -> None:
    code = "from engines.text.bounded import Bounds; Bounds(kill_after_s=0.2).run(lambda: 10 ** 10**9)"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "Timeout" in ended.stderr


def test_what_it_raises_itself_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        Bounds().run(rendering("{{ 1 // 0 }}"))


def test_time_that_is_over_just_at_the_end_interrupts_nothing_else() -> None:
    """The thread that looks on may be late by a moment: then nothing may be raised in what comes next."""
    bounds, ended = Bounds(limit_s=0.001), []

    def work() -> None:
        for _ in range(200):
            with suppress(TakesTooMuch):
                bounds.run(lambda: time.sleep(0.001))
            ended.append(sum(range(100)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(ended) == 200
