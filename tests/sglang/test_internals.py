"""What the plugin expects of SGLang, held against the real one. Starts an interpreter, no server."""

import os
import subprocess

import pytest

from engines.served.plugin_path import plugin_path
from tests.support.sglang import interpreter
from tests.support.sglang_plugin import PLUGIN

pytestmark = [pytest.mark.engine, pytest.mark.sglang]

_SCRIPT = """
from flexpiped_sglang import internals
print("as it is:", internals.check())
internals.VERSION = "0.99.0"
print("unknown:", internals.check())
internals.VERSION = internals.SUPPORTED[0]
internals.Scheduler.get_next_batch_to_run = lambda self: None
print("changed:", internals.check())
"""


def test_internals_are_as_expected_and_others_are_refused() -> None:
    python = interpreter()
    environment = {
        "PYTHONPATH": plugin_path(PLUGIN),
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "SGLANG_USE_CPU_ENGINE": "1",
    }
    done = subprocess.run(
        [python, "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if ": " in line or line.endswith(":"))
    assert said["as it is"].strip() == ""
    assert said["unknown"].strip() == "moves in place are tested with SGLang 0.5.23; this is 0.99.0"
    assert "Scheduler.get_next_batch_to_run(running_batch, last_batch)" in said["changed"]
