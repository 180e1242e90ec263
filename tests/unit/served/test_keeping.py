"""What the helper of a rank loads stays with the daemon's keeper, and the helper of another rank finds it there."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engines.parameters.keeper import ParameterKeeper
from engines.served.plugin_path import SHARED
from tests.support.until import until
from topology.units import MIB

sys.path.append(str(SHARED))  # as the interpreter of an engine has it

from flexpiped_served.keeping import KeptLayers, layer_key
from flexpiped_served.settings import PluginSettings
from flexpiped_served.weights import Manifest, lay_out, mapped

pytestmark = pytest.mark.real_loop


@pytest.fixture
async def keeper() -> AsyncIterator[ParameterKeeper]:
    keeper = ParameterKeeper(MIB)
    async with keeper.serving():
        yield keeper


class Rank:
    """A rank's helper without its process. ``keeps_mapped``: it goes on writing to what it has loaded."""

    def __init__(self, address: str, *, keeps_mapped: bool = False, key: str = "layer") -> None:
        settings = PluginSettings(
            directory=Path("/"), nice=0, slice_bytes=1, parameters=address, parameters_of="fake /srv/model"
        )
        self.loaded: list[int] = []
        self._key = key
        self._keeps_mapped = keeps_mapped
        self._views: list[dict[str, torch.Tensor]] = []
        self.layers = KeptLayers(settings, self._load, key_of=lambda index: self._key and f"{self._key} {index}")

    def _load(self, index: int) -> tuple[int, Manifest]:
        self.loaded.append(index)
        fd, manifest, views = lay_out(
            {"a.w": (torch.Size((3, 5)), torch.bfloat16), "b": (torch.Size((7,)), torch.int64)}
        )
        views["a.w"].fill_(index)
        views["b"].copy_(torch.arange(7))
        if self._keeps_mapped:
            self._views.append(views)
        return fd, manifest

    async def load(self, index: int) -> dict[str, torch.Tensor]:
        """Return a layer's parameters, as the rank maps them."""
        return mapped(*await asyncio.to_thread(self.layers.load, index))


RankOf = Callable[..., Rank]


@pytest.fixture
def rank_of() -> Iterator[RankOf]:
    made: list[Rank] = []

    def make(address: str, **more: Any) -> Rank:
        made.append(Rank(address, **more))
        return made[-1]

    yield make
    for each in made:
        each.layers.close()


async def test_a_second_rank_finds_what_the_first_has_loaded(keeper: ParameterKeeper, rank_of: RankOf) -> None:
    first, second = rank_of(keeper.address), rank_of(keeper.address)
    made, found = await first.load(4), await second.load(4)
    assert (first.loaded, second.loaded) == ([4], [])
    assert list(made) == list(found) == ["a.w", "b"]
    assert torch.equal(found["a.w"], torch.full((3, 5), 4.0, dtype=torch.bfloat16))
    assert torch.equal(found["b"], torch.arange(7))
    assert [(each.name, each.of, each.users) for each in keeper.kept.layers] == [("4", "fake /srv/model", 2)]
    first.layers.left(4)
    first.layers.left(4)  # it has let go of it already
    await until(lambda: keeper.kept.layers[0].users == 1)
    second.layers.left(4)
    await until(lambda: keeper.figures.idle_layers == 1)
    await first.load(4)
    assert first.loaded == [4]


async def test_a_load_that_is_repeated_counts_once(keeper: ParameterKeeper, rank_of: RankOf) -> None:
    rank = rank_of(keeper.address)
    await rank.load(2)
    await rank.load(2)  # the first came with a handover that failed
    assert [each.users for each in keeper.kept.layers] == [1]


async def test_layers_that_come_later_are_kept_by_the_keeper_of_the_next_daemon(
    keeper: ParameterKeeper, rank_of: RankOf
) -> None:
    gone = ParameterKeeper(MIB)
    rank = rank_of(gone.address)
    async with gone.serving():
        await rank.load(0)
        assert gone.figures.layers == 1
    await rank.load(1)  # nobody keeps it
    rank.layers.keep_at(keeper.address)
    rank.layers.left(0)
    await rank.load(2)
    assert [(each.name, each.users) for each in keeper.kept.layers] == [("2", 1)]


async def test_what_is_still_written_to_is_not_kept_and_said(
    keeper: ParameterKeeper, rank_of: RankOf, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = rank_of(keeper.address, keeps_mapped=True)
    assert (await rank.load(0))["b"].tolist() == list(range(7))
    assert keeper.kept.layers == ()
    assert "a layer cannot be kept in host memory: Device or resource busy" in capfd.readouterr().err


@pytest.mark.parametrize(("address", "key"), [("", "layer"), ("nobody-listens-there", "layer"), (None, "")])
async def test_without_a_keeper_or_a_key_layers_are_loaded(
    keeper: ParameterKeeper, rank_of: RankOf, address: str | None, key: str
) -> None:
    rank = rank_of(keeper.address if address is None else address, key=key)
    for _ in range(2):
        assert (await rank.load(3))["a.w"][0, 0] == 3
    assert rank.loaded == [3, 3]
    assert keeper.kept.layers == ()


class _Model:
    """Of this class are the layers."""


def config_of(**fields: Any) -> Any:
    """Return as much of an engine's ``ModelConfig`` as tells layers apart."""
    hub = SimpleNamespace(to_dict=lambda: {"num_hidden_layers": 8})
    return SimpleNamespace(**{"hf_config": hub, "dtype": torch.float32, "quantization": None, **fields})


async def test_a_layer_is_told_from_others_by_what_it_is_and_by_its_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")

    def key(*which: object, model: object = _Model(), **fields: Any) -> str:
        return layer_key("vllm", *which, model=model, config=config_of(**fields), files=[file])

    first = key(3)
    assert first == key(3)
    others = [key(4), key(3, model=object()), key(3, dtype=torch.bfloat16), key(3, quantization="fp8")]
    assert len({first, *others}) == 5
    file.write_bytes(b"other weights")
    assert key(3) != first


async def test_nothing_tells_a_layer_of_files_in_another_format() -> None:
    assert layer_key("vllm", 3, model=_Model(), config=config_of(), files=None) == ""


async def test_a_rank_may_write_to_what_it_has_and_others_do_not_see_it(
    keeper: ParameterKeeper, rank_of: RankOf
) -> None:
    rank = rank_of(keeper.address)
    for _ in range(2):
        mine = await rank.load(6)
        assert mine["a.w"][0, 0] == 6
        mine["a.w"].zero_()
    assert (keeper.figures.hits_total, keeper.figures.misses_total) == (1, 1)
