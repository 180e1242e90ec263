"""The check of vLLM's internals, in vLLM's own interpreter: what is not as expected is refused, with the version."""

import os
import subprocess

import pytest

from engines.vllm.command import PLUGIN
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm]
_SCRIPT = """
from flexpiped_vllm import internals
print("as it is:", internals.check())
version, internals.VERSION = internals.VERSION, "0.99.1"
print("unknown:", internals.check())
internals.VERSION = version
make_layers = internals.model_utils.make_layers
internals.model_utils.make_layers = lambda count, layer_fn: None
print("changed:", internals.check())
internals.model_utils.make_layers = make_layers
internals._missing = "cannot import name 'get_pp_group'"
print("missing:", internals.check())
"""


def test_an_unknown_vllm_is_refused_for_moves_in_place() -> None:
    environment = {"PYTHONPATH": str(PLUGIN), "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [interpreter(), "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if ":" in line)
    assert said["as it is"].strip() == ""
    assert "vLLM 0.99.1 is not a version that moves in place were tested with (0.32.0)" in said["unknown"]
    assert "make_layers(num_hidden_layers, layer_fn, prefix) is not what it was" in said["changed"]
    assert "0.32.0: cannot import name 'get_pp_group'" in said["missing"]
