"""Which engines could serve the model, and why not. The demo model is the model here."""

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import UnsupportedByEngine
from engines.native.adapter import NativeEngine
from engines.parameters.keeper import ParameterKeeper
from engines.vllm.adapter import VllmEngine
from flexpiped.engine_factory import find_files
from flexpiped.engine_offers import EngineOffers
from flexpiped.models import model_source
from flexpiped.settings import DeviceSettings, DevicesKind, EngineKind, EnginesSettings, Settings, VllmSettings
from planner.memory import KvBudget
from planner.parameter_cache import KeptLayer, KeptLayers
from planner.start_times import Origin
from tests.support.layouts import even_pipeline
from topology.units import MIB

VLLM = VllmSettings(python=Path("/opt/vllm/bin/python"), kv_cache_bytes=16 * MIB)
BOTH = Settings(engines=EnginesSettings(vllm=VLLM))


def offers(settings: Settings, source: str = "") -> EngineOffers:
    source = source or model_source(settings)
    return EngineOffers(settings, source=source, model=find_files(settings, source=source))


def test_each_engine_comes_with_its_own_part_of_the_configuration() -> None:
    known = offers(BOTH)
    assert isinstance(known.of("native").factory(even_pipeline(2), 0), NativeEngine)
    vllm = known.of("vllm").factory(even_pipeline(2), 3)
    assert isinstance(vllm, VllmEngine)
    assert (vllm.options.python, vllm.options.kv_cache_bytes, vllm.epoch) == ("/opt/vllm/bin/python", 16 * MIB, 3)
    assert known.of("vllm") is known.of("vllm")


def test_its_kv_cache_counts_in_the_check_of_memory() -> None:
    """The KV cache of the first is that of the native engine, the second's that of vLLM."""
    resolver, two = offers(BOTH).of("vllm").resolver, even_pipeline(2)
    kv = KvBudget(block_tokens=16, capacity_blocks=8, live_blocks=1)
    (same, _), (other, _) = (
        resolver.check_second(current=two, target=two, kv=kv, is_another_engine=another).devices
        for another in (False, True)
    )
    assert same.held_bytes == other.held_bytes
    assert same.gained_kv_bytes < other.gained_kv_bytes == 8 * MIB
    assert same.gained_live_kv_bytes == other.gained_live_kv_bytes


def test_what_adapters_take_of_each_device_is_not_there_for_layers() -> None:
    one, source = even_pipeline(1), model_source(Settings())
    layers_bytes = offers(Settings()).of("native").resolver.held_by([one])["cpu:0"]
    devices = DeviceSettings(kind=DevicesKind.CPU, cpu_count=2, cpu_memory_bytes=2 * layers_bytes)
    settings = replace(Settings(), devices=devices)
    taken_bytes = 0
    known = EngineOffers(
        settings, source=source, model=find_files(settings, source=source), adapter_bytes=lambda: taken_bytes
    )
    resolver = known.of("native").resolver
    assert resolver.broken_rules(one, current=None) == ()
    taken_bytes = layers_bytes * 3 // 2
    [broken] = resolver.broken_rules(one, current=None)
    assert "cpu:0 offers" in broken
    held = resolver.held_by([one], adapter_bytes=taken_bytes)  # as other models are told
    assert held == {"cpu:0": layers_bytes + taken_bytes, "cpu:1": taken_bytes}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vllm", "needs engines.vllm.python"),
        ("fake", "there is no engine 'fake'"),
        ("sglang", "needs engines.sglang.python"),
        ("tgi", "there is no engine 'tgi'"),
    ],
)
def test_what_cannot_be_had(name: str, why: str) -> None:
    with pytest.raises(UnsupportedByEngine, match=why):
        offers(Settings()).of(name)


def test_a_model_that_only_vllm_knows_stays_with_vllm(tmp_path: Path) -> None:
    demo = Path(model_source(BOTH))
    (tmp_path / "model.safetensors").symlink_to(demo / "model.safetensors")
    (tmp_path / "config.json").write_text((demo / "config.json").read_text().replace('"llama"', '"novel"'))
    with pytest.raises(UnsupportedByEngine, match="novel"):
        offers(replace(BOTH, engine=EngineKind.VLLM), str(tmp_path)).of("native")


class OneLayerKept(ParameterKeeper):
    """Has kept one layer, of so many bytes."""

    def __init__(self, of: str, num_bytes: int) -> None:
        super().__init__(budget_bytes=0)
        self._one = KeptLayers(layers=(KeptLayer(key="k", name="0", of=of, num_bytes=num_bytes),))

    @property
    def kept(self) -> KeptLayers:
        return self._one


@pytest.mark.parametrize(("has_it", "has_not"), [("native", "vllm"), ("vllm", "native")])
def test_a_start_counts_as_kept_where_that_engine_has_most_of_the_parameters(has_it: str, has_not: str) -> None:
    """Each has them in a form of its own."""
    source = model_source(BOTH)
    model = find_files(BOTH, source=source)
    parameters_bytes = sum(layer.weight_bytes for layer in model.graph.layers)
    of = str(model.directory) if has_it == "native" else f"{has_it} {model.directory}"
    for share, origins in ((0.6, {Origin.KEPT}), (0.4, {Origin.PAGE_CACHE, Origin.STORAGE})):
        parameters = OneLayerKept(of, round(share * parameters_bytes))
        known = EngineOffers(BOTH, source=source, model=model, parameters=parameters)
        assert known.of(has_it).starts.kept_share() == pytest.approx(share, abs=0.01)
        assert known.of(has_it).starts.origin in origins
        assert known.of(has_not).starts.kept_share() == 0.0
