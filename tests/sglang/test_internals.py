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
from types import SimpleNamespace as N
def first(quantisation=None, images=False, experts=1, speculative=None, offloaded_gb=0):
    internals.get_server_args = lambda: N(ep_size=experts, speculative_algorithm=speculative)
    internals.get_parallel = lambda: N(attn_dp_size=1, attn_cp_size=1)
    internals.get_exec = lambda: N(offload=N(cpu_offload_gb=offloaded_gb, offload_group_size=-1))
    return internals.refusal_of_first_layers(N(quantization=quantisation, is_multimodal=images))
print("first, plain:", first())
print("first, much:", first("gptq", True, experts=2, speculative="EAGLE", offloaded_gb=1))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What the script printed after each heading."""
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
    lines = [line.split(":", 1) for line in done.stdout.splitlines() if ": " in line or line.endswith(":")]
    return {heading: words.strip() for heading, words in lines}


def test_internals_are_as_expected_and_others_are_refused(said: dict[str, str]) -> None:
    assert said["as it is"] == ""
    assert said["unknown"] == "moves in place are tested with SGLang 0.5.23; this is 0.99.0"
    assert "Scheduler.get_next_batch_to_run(running_batch, last_batch)" in said["changed"]


def test_first_layers_that_are_not_kept_are_refused_by_what_they_have(said: dict[str, str]) -> None:
    assert said["first, plain"] == ""
    features = "quantisation (gptq), multimodal models, speculative decoding, expert parallelism, offloaded weights"
    assert said["first, much"] == f"they are not kept with {features}"
