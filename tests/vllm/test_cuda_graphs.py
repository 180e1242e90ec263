"""The order in which CUDA graphs are released and captured, in vLLM's interpreter with a runner that captures nothing.

It shows no more than the order: nothing here has run on a GPU.
"""

import json
import os
import subprocess
from typing import Any

import pytest

from engines.served.plugin_path import plugin_path
from engines.vllm.command import PLUGIN
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm]
_SCRIPT = """
import json
from contextlib import contextmanager
from types import SimpleNamespace as N
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.worker.workspace import init_workspace_manager
from flexpiped_vllm import compiled_internals
from flexpiped_vllm.compiling import CompileFailed
from flexpiped_vllm.cuda_graphs import GraphedForward
from flexpiped_served.failpoints import Failpoints

init_workspace_manager(torch.device("cpu"))
seen = []
torch.accelerator.synchronize = lambda: seen.append("synchronize")  # there is no accelerator

class Runner:
    fails = False
    def __init__(self):
        self.cudagraph_dispatcher = N(keys_initialized=True)
    def capture_model(self):
        seen.append(f"capture, dispatching {self.cudagraph_dispatcher.keys_initialized}")
        if self.fails:
            raise RuntimeError("out of memory")
        return 0
    @contextmanager
    def preserve_serving_state(self):
        seen.append("preserve")
        yield
        seen.append("restore")

def graphed(mode):
    config = N(compilation_config=N(cudagraph_mode=mode))
    core = N(do_not_compile=False, aot_compiled_fn="the old layers")
    return GraphedForward(Runner(), core, config, Failpoints()), core

def said(name, value):
    print("said", json.dumps([name, value]))

forward, core = graphed(CUDAGraphMode.FULL_AND_PIECEWISE)
forward._runner.capture_model()  # as vLLM does at start
said("at start", forward.state)
seen.clear()
wrapper = compiled_internals.CUDAGraphWrapper.__new__(compiled_internals.CUDAGraphWrapper)
wrapper.concrete_cudagraph_entries = {"a batch": "a graph"}
compiled_internals.CUDAGraphWrapper._all_instances.add(wrapper)
forward.fall_back()
said("fallen back", [forward.state, core.do_not_compile, core.aot_compiled_fn, wrapper.concrete_cudagraph_entries])
said("dispatching", forward._runner.cudagraph_dispatcher.keys_initialized)
said("predicted", forward.compile(forward.ticket(), held=[0], counts=[1])["load_s"] > 0)
forward.load([0])
said("captured", [forward.state, core.do_not_compile, seen])
forward.fall_back()
forward._runner.fails = True
try:
    forward.load([0])
except RuntimeError as error:
    said("failed", [str(error), forward.state, forward._runner.cudagraph_dispatcher.keys_initialized])
forward, _ = graphed(CUDAGraphMode.PIECEWISE)
forward.fall_back()
try:
    forward.compile(forward.ticket(), held=[0], counts=[1])
except CompileFailed as error:
    said("piecewise", str(error))
"""


def test_graphs_of_the_old_layers_are_never_replayed() -> None:
    environment = {"PYTHONPATH": plugin_path(PLUGIN), "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [interpreter(), "-c", _SCRIPT], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    lines = [line.removeprefix("said ") for line in done.stdout.splitlines() if line.startswith("said ")]
    said: dict[str, Any] = dict(json.loads(line) for line in lines)
    assert said == {
        "at start": "compiled",
        "fallen back": ["eager", True, None, {}],
        "dispatching": False,
        "predicted": True,
        "captured": [
            "compiled", True, ["synchronize", "preserve", "capture, dispatching True", "restore", "synchronize"],
        ],
        "failed": ["out of memory", "eager", False],
        "piecewise": "on CUDA, code is not compiled for another layout",
    }  # fmt: skip
