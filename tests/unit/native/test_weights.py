"""Weights of single layers, mapped from a checkpoint: equal to what transformers reads, and not copied."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engines.checkpoint import Checkpoint, read_checkpoint
from engines.native.attention import register
from engines.native.families import build_family
from engines.native.family import Family
from engines.native.kv_memory import KVMemory
from engines.native.stage import HeldLayers
from engines.native.weights import WeightFiles
from tests.support import checkpoints

Make = Callable[[Path], Path]


def llama(parent: Path, **overrides: Any) -> Path:
    name = "-".join(["llama", *(f"{key}-{value}" for key, value in overrides.items())])
    return checkpoints.make_llama(parent / name, num_layers=3, **overrides)


def tied_llama(parent: Path) -> Path:
    return llama(parent, tie_word_embeddings=True)


def sharded_llama(parent: Path) -> Path:
    return llama(parent, shards=3)


def gpt2(parent: Path) -> Path:
    return checkpoints.make_gpt2(parent / "gpt2", num_layers=3)


def gpt2_without_prefix(parent: Path) -> Path:
    """GPT-2 as it was published: the names begin at the base model."""
    directory = parent / "gpt2-without-prefix"
    if not directory.exists():
        shutil.copytree(gpt2(parent), directory)
        file = directory / "model.safetensors"
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


ALL = [llama, tied_llama, sharded_llama, gpt2, gpt2_without_prefix]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Worker:
    """What a worker has of a model before it is given a stage."""

    def __init__(self, directory: Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint: Checkpoint = read_checkpoint(directory)
        config = AutoConfig.from_pretrained(directory)
        self.family: Family = build_family(config, attention=register(None), max_model_len=64, dtype=dtype)
        self.kv = KVMemory(
            num_decoders=self.family.num_decoders,
            num_slots=64,
            num_kv_heads=self.family.num_kv_heads,
            head_dim=self.family.head_dim,
            dtype=dtype,
        )
        self.weights = WeightFiles(self.checkpoint, dtype=dtype)
        self.layers = HeldLayers(self.family, self.weights, self.kv, self.checkpoint.tensors)

    def take(self, *layers: str) -> None:
        for layer in layers:
            self.layers.attach(layer, self.layers.read(layer))

    def parameters(self, layer: str) -> dict[str, torch.Tensor]:
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.family.modules(layer).items()
            for name, parameter in module.named_parameters()
        }

    def mapping_of(self, name: str) -> range:
        """Return the addresses at which a file of the checkpoint is mapped."""
        entry = self.checkpoint.tensors[name]
        start = self.weights.tensor(name).data_ptr() - entry.start
        return range(start, start + entry.file.stat().st_size)


LAYERS = ("embedding", "0", "1", "2", "head")


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).state_dict()
    return state


@pytest.mark.parametrize("make", ALL)
def test_every_layer_gets_what_transformers_reads_without_a_copy(make: Make, parent: Path) -> None:
    worker = Worker(make(parent))
    worker.take(*LAYERS)
    expected = reference(make(parent))
    seen = set[str]()
    for layer in LAYERS:
        stored = worker.layers.tensor_names(layer)
        for name, parameter in worker.parameters(layer).items():
            assert torch.equal(parameter, expected[name])
            assert parameter.data_ptr() in worker.mapping_of(stored[name])
            seen.add(name)
    assert seen == expected.keys()
    assert worker.layers.held == set(LAYERS)


@pytest.mark.parametrize("make", [tied_llama, gpt2, gpt2_without_prefix])
def test_a_tied_head_reads_the_embedding(make: Make, parent: Path) -> None:
    layers = Worker(make(parent)).layers
    table = next(iter(layers.tensor_names("embedding").values()))
    assert layers.tensor_names("head")["lm_head.weight"] == table


def test_a_head_of_its_own_is_read(parent: Path) -> None:
    assert Worker(llama(parent)).layers.tensor_names("head")["lm_head.weight"] == "lm_head.weight"


def test_only_what_was_taken_is_there(parent: Path) -> None:
    worker = Worker(llama(parent))
    worker.take("1")
    assert not any(parameter.is_meta for parameter in worker.parameters("1").values())
    assert all(
        parameter.is_meta
        for layer in ("embedding", "0", "2", "head")
        for parameter in worker.parameters(layer).values()
    )
    assert worker.layers.weights_bytes == sum(p.nbytes for p in worker.parameters("1").values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_is_converted_as_transformers_does(dtype: torch.dtype, parent: Path) -> None:
    worker = Worker(llama(parent), dtype=dtype)
    worker.take(*LAYERS)
    expected = reference(llama(parent), dtype)
    for layer in LAYERS:
        for name, parameter in worker.parameters(layer).items():
            assert torch.equal(parameter, expected[name])


def test_half_precision_weights_are_mapped_too(parent: Path) -> None:
    directory = llama(parent, dtype="bfloat16")
    worker = Worker(directory, dtype=torch.bfloat16)
    worker.take("1")
    expected = reference(directory, torch.bfloat16)
    stored = worker.layers.tensor_names("1")
    for name, parameter in worker.parameters("1").items():
        assert torch.equal(parameter, expected[name])
        assert parameter.data_ptr() in worker.mapping_of(stored[name])


def test_a_tensor_that_is_not_aligned_is_copied(parent: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(llama(parent), tmp_path / "odd"))
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    worker = Worker(directory)
    worker.take("0")
    expected = reference(llama(parent))
    for name, parameter in worker.parameters("0").items():
        assert parameter.data_ptr() % 4 == 0
        assert torch.equal(parameter, expected[name])


def test_drop_gives_weights_and_kv_memory_back(parent: Path) -> None:
    worker = Worker(llama(parent))
    worker.take("0", "1")
    one = sum(parameter.nbytes for parameter in worker.parameters("1").values())
    for decoder in (0, 1):
        worker.kv.keys[decoder][:] = 1.0
    kv_bytes = worker.kv.mapped_bytes(1)
    assert kv_bytes > 0
    assert worker.layers.kv_mapped_bytes() == 2 * kv_bytes
    assert worker.layers.drop("1") == (one, kv_bytes)
    assert worker.layers.held == {"0"}
    assert (worker.layers.weights_bytes, worker.layers.kv_mapped_bytes()) == (one, kv_bytes)
    assert all(parameter.is_meta for parameter in worker.parameters("1").values())


@pytest.mark.parametrize("make", ALL)
def test_a_dropped_layer_can_be_taken_again(make: Make, parent: Path) -> None:
    worker = Worker(make(parent))
    worker.take(*LAYERS)
    expected = reference(make(parent))
    for layer in LAYERS:
        worker.layers.drop(layer)
    assert (worker.layers.held, worker.layers.weights_bytes) == (frozenset(), 0)
    worker.take(*LAYERS)
    for layer in LAYERS:
        assert all(torch.equal(p, expected[name]) for name, p in worker.parameters(layer).items())


@pytest.mark.parametrize("make", [tied_llama, gpt2, gpt2_without_prefix])
@pytest.mark.parametrize(("dropped", "kept"), [("embedding", "head"), ("head", "embedding")])
def test_a_tied_tensor_outlives_one_of_its_layers(make: Make, dropped: str, kept: str, parent: Path) -> None:
    worker = Worker(make(parent))
    worker.take("embedding", "head")
    expected = reference(make(parent))
    worker.layers.drop(dropped)
    for name, parameter in worker.parameters(kept).items():
        assert torch.equal(parameter, expected[name])
    assert all(parameter.is_meta for parameter in worker.parameters(dropped).values())


def test_release_counts_the_bytes_and_harms_nothing(parent: Path) -> None:
    worker = Worker(llama(parent))
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = worker.weights.tensor(name)
    before = tensor.clone()
    assert worker.weights.release([name]) == tensor.nbytes
    assert torch.equal(tensor, before)  # faulted in again from the page cache


def test_populate_reads_or_stops_when_cancelled(parent: Path) -> None:
    worker = Worker(llama(parent))
    names = list(worker.layers.tensor_names("0").values())
    cancelled = threading.Event()
    worker.weights.populate(names, cancelled)
    cancelled.set()
    worker.weights.populate(names, cancelled)
    assert torch.equal(worker.weights.tensor(names[0]), reference(llama(parent))[names[0]])


def test_a_tensor_that_is_not_there_is_named(parent: Path) -> None:
    worker = Worker(llama(parent))
    incomplete = worker.checkpoint.tensors.keys() - {"model.norm.weight"}
    layers = HeldLayers(worker.family, worker.weights, worker.kv, incomplete)
    with pytest.raises(KeyError, match=r"no tensor for model\.norm\.weight"):
        layers.read("head")
