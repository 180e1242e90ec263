"""From settings to model, layout and engine. The demo model is the model here: only its headers are read."""

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import UnsupportedByEngine
from engines.fake import FakeEngine
from engines.native.adapter import NativeEngine
from flexpiped.config_values import Auto
from flexpiped.engine_factory import Model, devices_of, engine_factory, engine_python, find_files
from flexpiped.handover_records import Wanted
from flexpiped.models import demo_model_places, for_people, model_source, served_name
from flexpiped.settings import DeviceSettings, EngineKind, EnginesSettings, NativeSettings, Settings
from flexpiped.target_resolver import PlannerResolver
from planner.errors import InvalidLayout, NoFeasiblePlan

DEFAULTS = Settings()


@pytest.fixture(scope="module")
def model() -> Model:
    return find_files(DEFAULTS, source=model_source(DEFAULTS))


@pytest.fixture(scope="module")
def resolver(model: Model) -> PlannerResolver:
    return PlannerResolver(graph=model.graph, devices=devices_of(DEFAULTS), kv_cache_bytes=64 << 20)


def test_the_demo_model_lies_beside_the_package() -> None:
    assert model_source(DEFAULTS) == str(demo_model_places()[0])
    assert served_name(DEFAULTS, model_source(DEFAULTS)) == "demo-model"
    assert for_people(str(Path.cwd() / "etc" / "x")) == "etc/x"
    assert for_people("org/name") == "org/name"


def test_another_model_is_named_by_its_last_part() -> None:
    hub = replace(DEFAULTS, model="org/name")
    assert (model_source(hub), served_name(hub, "org/name")) == ("org/name", "name")
    assert served_name(replace(hub, served_model_name="mine"), "org/name") == "mine"


def test_the_files_are_described_without_reading_weights(model: Model) -> None:
    assert (model.graph.num_decoders, model.graph.dtype) == (8, "float32")
    assert model.tokenizer_directory == model.directory


def test_code_of_models_is_refused() -> None:
    with pytest.raises(UnsupportedByEngine, match="trust_remote_code"):
        find_files(replace(DEFAULTS, trust_remote_code=True), source=model_source(DEFAULTS))


def test_a_model_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByEngine, match=r"config\.json"):
        find_files(DEFAULTS, source=str(tmp_path))


def test_each_engine_is_made_for_a_pipeline(model: Model, resolver: PlannerResolver) -> None:
    pipeline = resolver.first(2)

    native = engine_factory(DEFAULTS, model)(pipeline, 3)
    fake = engine_factory(replace(DEFAULTS, engine=EngineKind.FAKE), model)(pipeline, 3)

    assert isinstance(native, NativeEngine)
    assert isinstance(fake, FakeEngine)
    assert native.pipeline == fake.pipeline == pipeline
    assert native.epoch == fake.epoch == 3
    assert (fake.capabilities.vocab_size, fake.capabilities.max_stages) == (model.graph.vocab_size, 8)


def test_devices_and_interpreter_are_as_configured() -> None:
    settings = replace(
        DEFAULTS,
        devices=DeviceSettings(cpu_count=3, cpu_memory_bytes=1 << 20),
        engines=EnginesSettings(native=NativeSettings(python=Path("/opt/engine/bin/python"))),
    )

    assert [(each.id, each.memory_total_bytes) for each in devices_of(settings)] == [
        (f"cpu:{index}", 1 << 20) for index in range(3)
    ]
    assert engine_python(settings) == "/opt/engine/bin/python"


def test_stages_and_layout_files_become_pipelines(resolver: PlannerResolver) -> None:
    current = resolver.first(Auto.AUTO)
    assert current.granularity == 1

    four = resolver.resolve(Wanted(stages=4), current=current)
    assert (four.granularity, four.num_decoders) == (4, 8)
    layout = '{"stages": [{"devices": ["cpu:5"], "decoders": [0, 8]}]}'
    assert resolver.resolve(Wanted(layout=layout), current=current).device_ids == ("cpu:5",)
    assert resolver.resolve(Wanted(stages=Auto.AUTO), current=four).granularity == 1


def test_what_cannot_be_is_refused_in_words(resolver: PlannerResolver) -> None:
    current = resolver.first(1)
    with pytest.raises(NoFeasiblePlan, match="at most 8 stages"):
        resolver.resolve(Wanted(stages=12), current=current)
    with pytest.raises(InvalidLayout, match="not valid JSON"):
        resolver.resolve(Wanted(layout="two"), current=current)
