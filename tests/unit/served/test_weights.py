"""The helper that reads the weights of layers is a process of its own, and is replaced when it dies."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.served.plugin_path import SHARED

sys.path.append(str(SHARED))  # as the interpreter of an engine has it

from flexpiped_served.checkpoint import layer_weights
from flexpiped_served.weights import HelperFailed, Manifest, WeightHelper, lay_out

pytestmark = pytest.mark.real_loop
DEADLY, WRONG = 7, 8


class Layers:
    """A loader whose layers are full of their own index."""

    def __init__(self) -> None:
        self.address = 0

    def load(self, index: int) -> tuple[int, Manifest]:
        if index == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == WRONG:
            raise ValueError("no such layer")
        fd, manifest, views = lay_out({"w": (torch.Size((2,)), torch.int64)})
        views["w"].copy_(torch.tensor([index, self.address]))
        return fd, manifest

    def left(self, index: int) -> None:
        """Nothing is kept here."""

    def keep_at(self, address: str) -> None:
        self.address = int(address)

    def forked(self) -> None:
        """Nothing was loaded before."""


@pytest.fixture
def helper() -> Iterator[WeightHelper]:
    made = WeightHelper(Layers(), let_go=lambda: None)
    yield made
    made.close()


def test_another_process_loads(helper: WeightHelper) -> None:
    assert helper.pid != os.getpid()
    helper.keep_at("5")
    assert helper.load(3)["w"].tolist() == [3, 5]
    with pytest.raises(HelperFailed, match="no such layer"):
        helper.load(WRONG)
    assert helper.load(4)["w"].tolist() == [4, 5]


def test_one_that_was_killed_is_replaced_and_the_next_knows_what_it_knew(helper: WeightHelper) -> None:
    helper.keep_at("5")
    killed = helper.pid
    os.kill(killed, signal.SIGKILL)
    assert helper.load(3)["w"].tolist() == [3, 5]
    assert helper.pid != killed


def test_one_that_replaces_another_outlives_the_thread_that_has_asked(helper: WeightHelper) -> None:
    os.kill(helper.pid, signal.SIGKILL)
    pids = []
    for _ in range(2):  # each move has a thread of its own
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(helper.load, 3).result()["w"].tolist() == [3, 0]
        pids.append(helper.pid)
    assert pids[0] == pids[1]


def test_threads_get_what_they_have_asked_for(helper: WeightHelper) -> None:
    """As when a move was called off while it waits for a layer, and the next one asks."""
    with ThreadPoolExecutor(4) as threads:
        layers = list(threads.map(helper.load, range(10, 50)))
    assert [layer["w"].tolist()[0] for layer in layers] == list(range(10, 50))


def test_a_layer_that_kills_each_that_loads_it_is_an_error(helper: WeightHelper) -> None:
    with pytest.raises(HelperFailed, match="has ended"):
        helper.load(DEADLY)
    assert helper.load(3)["w"].tolist() == [3, 0]


@pytest.mark.parametrize("is_safetensors", [True, False])
def test_of_a_checkpoint_the_tensors_of_one_layer_are_read(tmp_path: Path, is_safetensors: bool) -> None:
    tensors = {f"model.layers.{index}.w": torch.tensor([float(index)]) for index in (1, 10, 11)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = [tmp_path / "model.safetensors"] if is_safetensors else None
    found = dict(layer_weights("model.layers", 1, files=files, read_all=tensors.items))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"model.layers.1.w": [1.0]}
