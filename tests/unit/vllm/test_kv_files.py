"""A request's KV cache as files: written piece by piece by one worker, loaded by others that hold other layers."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engines.served.plugin_path import SHARED
from engines.vllm.command import PLUGIN

sys.path += [str(PLUGIN), str(SHARED)]  # as vLLM's interpreter has it

from flexpiped_vllm.kv_files import KvFiles

BLOCKS = 12
SHAPE = (2, 4, 3)  # heads, token slots, numbers of a slot


def worker(*layers: str, seed: int, share: int = 0) -> tuple[dict[str, SimpleNamespace], KvFiles]:
    torch.manual_seed(seed)
    context = {name: SimpleNamespace(kv_cache=torch.randn(BLOCKS, *SHAPE)) for name in layers}
    context["mlp"] = SimpleNamespace()
    return context, KvFiles(context, num_blocks=BLOCKS, share=share)


def test_layers_go_to_workers_that_hold_others(tmp_path: Path) -> None:
    first, source = worker("layer.0", "layer.1", "layer.2", seed=1)
    source.write(tmp_path, start=0, blocks=[7, 2], total=3)
    source.write(tmp_path, start=2, blocks=[5], total=3)
    for layers in (("layer.0",), ("layer.1", "layer.2")):
        second, target = worker(*layers, seed=2)
        before = {name: second[name].kv_cache.clone() for name in layers}
        target.open(tmp_path, total=3)
        target.load(tmp_path, first=1, blocks=[9, 3])  # the first KV block is known there
        for name in layers:
            assert torch.equal(second[name].kv_cache[[9, 3]], first[name].kv_cache[[2, 5]])
            rest = [block for block in range(BLOCKS) if block not in (9, 3)]
            assert torch.equal(second[name].kv_cache[rest], before[name][rest])
        target.close(tmp_path)
        target.close(tmp_path)


def test_pieces_may_come_in_any_order(tmp_path: Path) -> None:
    first, source = worker("layer.0", seed=1)
    source.write(tmp_path, start=2, blocks=[5], total=3)
    source.write(tmp_path, start=0, blocks=[7, 2], total=3)
    second, target = worker("layer.0", seed=2)
    target.open(tmp_path, total=3)
    target.load(tmp_path, first=0, blocks=[0, 1, 2])
    assert torch.equal(second["layer.0"].kv_cache[:3], first["layer.0"].kv_cache[[7, 2, 5]])


def test_a_layer_that_was_not_written_or_not_wholly_is_noticed(tmp_path: Path) -> None:
    _, source = worker("layer.0", seed=1)
    source.write(tmp_path, start=0, blocks=[7, 2], total=2)
    _, other_layer = worker("layer.1", seed=2)
    with pytest.raises(FileNotFoundError):
        other_layer.open(tmp_path, total=2)
    _, other_share = worker("layer.0", seed=2, share=1)
    with pytest.raises(FileNotFoundError):
        other_share.open(tmp_path, total=2)
    _, same = worker("layer.0", seed=2)
    with pytest.raises(ValueError, match=r"KV cache of layer\.0: 192 bytes instead of 288"):
        same.open(tmp_path, total=3)


def test_equal_forms_are_equal_words() -> None:
    _, one = worker("layer.0", "layer.1", seed=1)
    _, two = worker("layer.7", seed=2)
    assert one.form == two.form == "96 bytes of torch.float32 (2, 4, 3) [1, 2, 3]"
    context, other = worker("layer.0", seed=1)
    context["layer.0"].kv_cache = context["layer.0"].kv_cache.transpose(1, 2)
    assert other.form != one.form
    assert (one.layers, one.block_bytes) == (2, 192)
    assert worker(seed=1)[1].form == ""
