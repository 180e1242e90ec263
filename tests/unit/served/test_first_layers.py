"""The first layers of an instance: those that are kept are put in, the rest is read, and is kept from then on."""

import asyncio
import json
import os
import re
import struct
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engines.parameters.keeper import ParameterKeeper
from engines.served.plugin_path import SHARED
from tests.support.until import until
from topology.units import KIB, MIB

sys.path.append(str(SHARED))  # as the interpreter of an engine has it

from flexpiped_served.finding import CannotMove
from flexpiped_served.first_layers import FirstLayers, where_layers_are
from flexpiped_served.keeping import KeptLayers
from flexpiped_served.settings import PluginSettings
from flexpiped_served.weights import Manifest

pytestmark = pytest.mark.real_loop
LAYERS, SIZE = 12, 32  # so that one layer's number begins with that of another
LAYER_BYTES = SIZE * SIZE * 4


class Model(torch.nn.Module):
    """As an engine has one: it stacks two tensors of the checkpoint in one parameter, and knows what it was given."""

    def __init__(self) -> None:
        super().__init__()
        layers = [torch.nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float32) for _ in range(LAYERS)]
        self.layers = torch.nn.ModuleList(layers)
        self.head = torch.nn.Parameter(torch.zeros(SIZE))
        self.given: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            self.given.append(name)
            if name == "lm_head.weight":
                self.head.data.copy_(tensor)
                loaded.add("head")
                continue
            _, _, index, half, _ = name.split(".")
            rows = slice(0, SIZE // 2) if half == "upper" else slice(SIZE // 2, SIZE)
            self.get_submodule(f"layers.{index}").weight.data[rows].copy_(tensor)
            loaded.add(f"layers.{index}.weight")
        return loaded


def checkpoint() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    halves = [f"model.layers.{index}.{half}.weight" for index in range(LAYERS) for half in ("upper", "lower")]
    return {"lm_head.weight": torch.rand(SIZE), **{name: torch.rand(SIZE // 2, SIZE) for name in halves}}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(each.numpy().tobytes() for each in tensors.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A model that has been loaded. ``loaded``: what its loader was told; ``own_reads``: what that has read itself."""

    model: Model
    kept: KeptLayers
    loaded: set[str]
    own_reads: list[str] = field(default_factory=list)

    @property
    def given_layers(self) -> set[int]:
        return {int(name.split(".")[2]) for name in self.model.given if name != "lm_head.weight"}


def no_helper(_index: int) -> tuple[int, Manifest]:
    raise AssertionError("a first layer is not loaded by the helper")


def load(address: str, file: Path, layers: Iterable[int], key: str) -> Instance:
    settings = PluginSettings(directory=Path("/"), nice=0, slice_bytes=1, parameters=address, parameters_of="fake")
    kept = KeptLayers(settings, no_helper, key_of=lambda index: f"{key} {index}")
    model, own_reads = Model(), []

    def engines_own() -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint().items():
            own_reads.append(name)
            yield name, tensor

    mine = {index: model.get_submodule(f"layers.{index}") for index in layers}
    with FirstLayers(kept, mine, prefix="model.layers", files=[file]).standing_in(model):
        loaded = model.load_weights(engines_own())
    return Instance(model=model, kept=kept, loaded=loaded, own_reads=own_reads)


@asynccontextmanager
async def instance(
    address: str, file: Path, layers: Iterable[int] = range(LAYERS), key: str = "layer"
) -> AsyncIterator[Instance]:
    made = await asyncio.to_thread(load, address, file, layers, key)
    try:
        yield made
    finally:
        made.kept.close()


def assert_right(model: Model) -> None:
    whole = checkpoint()
    assert torch.equal(model.head, whole["lm_head.weight"])
    for index in range(LAYERS):
        halves = [whole[f"model.layers.{index}.{half}.weight"] for half in ("upper", "lower")]
        assert torch.equal(model.get_parameter(f"layers.{index}.weight"), torch.cat(halves))


@pytest.fixture
async def keeper() -> AsyncIterator[ParameterKeeper]:
    keeper = ParameterKeeper(MIB)
    async with keeper.serving():
        yield keeper


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, checkpoint())
    return path


async def test_the_second_instance_has_its_layers_from_memory(keeper: ParameterKeeper, file: Path) -> None:
    async with instance(keeper.address, file) as cold:
        assert len(cold.own_reads) == 2 * LAYERS + 1  # by its own loader, as without a keeper
        assert [each.users for each in keeper.kept.layers] == [1] * LAYERS
    await until(lambda: keeper.figures.idle_layers == LAYERS)
    async with instance(keeper.address, file) as warm:
        assert warm.own_reads == []
        assert warm.model.given == ["lm_head.weight"]
        assert (keeper.figures.hits_total, keeper.figures.misses_total) == (LAYERS, LAYERS)
        assert warm.loaded == cold.loaded == {name for name, _ in warm.model.named_parameters()}
        for each in (cold, warm):
            assert_right(each.model)


async def test_what_is_not_kept_is_read(keeper: ParameterKeeper, file: Path) -> None:
    async with instance(keeper.address, file, layers=[1, 3]):
        pass
    async with instance(keeper.address, file) as second:
        assert second.given_layers == set(range(LAYERS)) - {1, 3}  # 11 and 10 are others than 1
        assert_right(second.model)
    async with instance(keeper.address, file) as third:
        assert third.model.given == ["lm_head.weight"]
        assert_right(third.model)


async def test_another_checkpoint_has_layers_of_its_own(keeper: ParameterKeeper, file: Path) -> None:
    async with instance(keeper.address, file), instance(keeper.address, file, key="another") as other:
        assert other.given_layers == set(range(LAYERS))
        assert_right(other.model)


async def test_a_model_larger_than_the_budget_keeps_what_came_first(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keeper = ParameterKeeper(3 * (LAYER_BYTES + KIB))
    async with keeper.serving():
        async with instance(keeper.address, file) as cold:
            assert_right(cold.model)
        async with instance(keeper.address, file) as warm:
            assert warm.given_layers == set(range(3, LAYERS))
            assert_right(warm.model)
    said = [re.sub(r", in \d+\.\d{3} s", "", line) for line in capfd.readouterr().err.splitlines()]
    assert said == [
        "of the first 12 layers 0 came from the memory of the host, 12 from the files; 3 of these are kept now",
        "of the first 12 layers 3 came from the memory of the host, 9 from the files; 0 of these are kept now",
    ]


async def test_what_an_instance_writes_others_do_not_see(keeper: ParameterKeeper, file: Path) -> None:
    for _ in range(3):
        async with instance(keeper.address, file) as each:
            assert_right(each.model)
            for parameter in each.model.parameters():
                parameter.data.zero_()


async def test_layers_of_another_form_are_read(keeper: ParameterKeeper, file: Path) -> None:
    """The key tells them apart; were it wrong, the start would go on."""
    async with instance(keeper.address, file) as cold:
        settings = PluginSettings(directory=Path("/"), nice=0, slice_bytes=1, parameters=keeper.address)
        kept = KeptLayers(settings, no_helper, key_of=lambda index: f"layer {index}")
        model = Model()
        mine = {index: torch.nn.ModuleDict({"more": model.get_submodule(f"layers.{index}")}) for index in (0, 1)}
        with FirstLayers(kept, mine, prefix="model.layers", files=[file]).standing_in(model):
            await asyncio.to_thread(model.load_weights, checkpoint().items())
        kept.close()
        assert_right(model)
        assert_right(cold.model)


async def test_without_a_keeper_that_answers_all_is_read(file: Path) -> None:
    async with instance("nobody-listens-there", file) as alone:
        assert alone.given_layers == set(range(LAYERS))
        assert_right(alone.model)


async def test_a_layer_that_leaves_in_a_move_is_in_use_no_more(keeper: ParameterKeeper, file: Path) -> None:
    async with instance(keeper.address, file) as cold:
        cold.kept.left(4)
        await until(lambda: keeper.figures.idle_layers == 1)
        cold.kept.left(4)
        cold.kept.left(5)
        await until(lambda: keeper.figures.idle_layers == 2)


async def test_a_fork_has_a_connection_of_its_own(keeper: ParameterKeeper, file: Path) -> None:
    """What the first process has stays in use when its helper goes."""
    async with instance(keeper.address, file, layers=[0, 1]) as cold:
        kept = cold.kept
        kept.forked()  # here there is one process: its connection is gone
        await until(lambda: keeper.figures.idle_layers == 2)
        kept.left(0)
        again = await asyncio.to_thread(kept.found, 0)
        assert again is not None
        os.close(again[0])
        assert keeper.figures.idle_layers == 1


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (("layers", None), "which are not in the safetensors format"),
        (CannotMove("it does not use make_layers"), ": it does not use make_layers"),
        (OSError("no such file"), ": no such file"),
    ],
)
def test_why_all_layers_come_from_the_files_is_said(
    capsys: pytest.CaptureFixture[str], found: tuple[str, None] | Exception, reason: str
) -> None:
    def find() -> tuple[str, list[Path] | None]:
        if isinstance(found, Exception):
            raise found
        return found

    assert where_layers_are(find) is None
    assert "all layers come from the files" in (said := capsys.readouterr().err)
    assert said.endswith(f"{reason}\n")
    assert where_layers_are(lambda: ("layers", [Path("a")])) == ("layers", [Path("a")])
