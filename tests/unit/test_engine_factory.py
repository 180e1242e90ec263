"""From settings to model, layout and engine. The demo model is the model here: only its headers are read."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engines.errors import EngineStartFailed, UnsupportedByEngine
from engines.fake import FakeEngine
from engines.native.adapter import NativeEngine
from engines.vllm.adapter import VllmEngine
from engines.vllm.recompile import Recompilation
from flexpiped.config_values import Auto
from flexpiped.costs import Costs
from flexpiped.engine_factory import Model, devices_of, engine_factory, find_files
from flexpiped.handover_records import Wanted
from flexpiped.models import demo_model_places, for_people, model_source, served_name
from flexpiped.native_interpreter import engine_python
from flexpiped.planner_question import question_of
from flexpiped.settings import (
    DeviceSettings,
    DType,
    EngineKind,
    EnginesSettings,
    NativeSettings,
    Settings,
    VllmSettings,
)
from flexpiped.target_resolver import PlannerResolver
from planner.errors import InvalidLayout, NoFeasiblePlan
from planner.layout import Pipeline, Stage, pipeline_of
from planner.memory import KvBudget
from tests.support.costs import FlatCosts
from topology.topology import HostTopology

DEFAULTS = Settings()


@pytest.fixture(scope="module")
def model() -> Model:
    return find_files(DEFAULTS, source=model_source(DEFAULTS))


@pytest.fixture(scope="module")
def resolver(model: Model) -> PlannerResolver:
    topology = HostTopology(host_id="h", devices=devices_of(DEFAULTS))
    question = question_of(
        DEFAULTS, graph=model.graph, topology=topology, costs=Costs(alone=FlatCosts(), beside=FlatCosts())
    )
    return PlannerResolver(lambda: question)


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


def test_vllm_may_run_the_code_of_models_and_knows_more_of_them(tmp_path: Path) -> None:
    vllm = replace(DEFAULTS, engine=EngineKind.VLLM, trust_remote_code=True)
    assert find_files(vllm, source=model_source(vllm)).graph.num_decoders == 8
    demo = Path(model_source(DEFAULTS))
    (tmp_path / "model.safetensors").symlink_to(demo / "model.safetensors")
    (tmp_path / "config.json").write_text((demo / "config.json").read_text().replace('"llama"', '"novel"'))
    graph = find_files(vllm, source=str(tmp_path)).graph
    assert (graph.model_type, graph.num_decoders) == ("novel", 8)
    with pytest.raises(UnsupportedByEngine, match="novel"):
        find_files(DEFAULTS, source=str(tmp_path))


def vllm_settings(**values: object) -> Settings:
    return replace(DEFAULTS, engine=EngineKind.VLLM, engines=EnginesSettings(vllm=VllmSettings(**values)))  # type: ignore[arg-type]


def test_ranks_of_vllm_stay_over_restarts_and_follow_a_layout_they_cannot_run(model: Model) -> None:
    factory = engine_factory(vllm_settings(ranks=3), model)
    first = factory(pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8), 0)
    assert first.options.device_ids == ("cpu:0", "cpu:2", "cpu:1")
    drained = pipeline_of(device_ids=["cpu:0", "cpu:2", "cpu:1"], cuts=[7, 8], num_decoders=8)
    assert factory(drained, 4).options.device_ids == first.options.device_ids
    more = pipeline_of(device_ids=["cpu:0", "cpu:1", "cpu:2", "cpu:3"], cuts=[2, 4, 6], num_decoders=8)
    assert factory(more, 5).options.device_ids == ("cpu:0", "cpu:1", "cpu:2", "cpu:3")


def test_tensor_parallel_stages_take_groups_of_devices(model: Model) -> None:
    factory = engine_factory(vllm_settings(tensor_parallel=2), model)
    engine = factory(pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8), 0)
    assert [stage.device_ids for stage in engine.pipeline.stages] == [("cpu:0", "cpu:1"), ("cpu:2", "cpu:3")]
    with pytest.raises(UnsupportedByEngine, match=r"tensor_parallel: 2 stages of 16"):
        engine_factory(vllm_settings(tensor_parallel=16), model)(engine.pipeline, 0)


def test_what_vllm_is_told(model: Model) -> None:
    settings = vllm_settings(kv_cache_bytes=1 << 20, nice=3, args=("--seed", "1"), env={"A": "b"})
    factory = engine_factory(replace(settings, dtype=DType.FLOAT32, max_model_len=99, hf_token_file=Path("/t")), model)
    engine = factory(pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8), 0)
    options = engine.options
    assert (options.dtype, options.max_model_len, options.hf_token_file) == ("float32", 99, "/t")
    assert options.kv_cache_bytes == 1 << 20
    assert (options.args, options.env, options.nice, options.num_decoders) == (("--seed", "1"), {"A": "b"}, 3, 8)
    assert options.kv_bytes_per_token == model.graph.decoders[0].kv_bytes_per_token


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
    vllm = engine_factory(replace(DEFAULTS, engine=EngineKind.VLLM), model)(pipeline, 3)
    assert isinstance(vllm, VllmEngine)
    assert (vllm.pipeline, vllm.epoch) == (pipeline, 3)
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


def test_a_daemon_without_transformers_takes_an_engine_s_interpreter_or_says_what_to_do() -> None:
    vllm = Settings(engines=EnginesSettings(vllm=VllmSettings(python=Path("/opt/vllm/bin/python"))))

    assert engine_python(Settings(), own_has_transformers=True) == sys.executable
    assert engine_python(vllm, own_has_transformers=True) == sys.executable
    assert engine_python(vllm, own_has_transformers=False) == "/opt/vllm/bin/python"
    with pytest.raises(EngineStartFailed, match=r"set python under \[engines.native\]"):
        engine_python(Settings(), own_has_transformers=False)


def test_stages_and_layout_files_become_pipelines(resolver: PlannerResolver) -> None:
    current = resolver.first(Auto.AUTO)
    assert current.granularity == 1

    four = resolver.resolve(Wanted(stages=4), current=current)
    assert (four.granularity, four.num_decoders) == (4, 8)
    layout = '{"stages": [{"devices": ["cpu:5"], "decoders": [0, 8]}]}'
    assert resolver.resolve(Wanted(layout=layout), current=current).device_ids == ("cpu:5",)
    assert resolver.resolve(Wanted(stages=Auto.AUTO), current=four) == four  # nothing would serve better


def test_without_a_number_there_are_two_stages_or_what_can_be(model: Model, resolver: PlannerResolver) -> None:
    two, why = resolver.begin(None)
    assert (two, why) == (resolver.first(2), "")
    topology = HostTopology(host_id="h", devices=devices_of(DEFAULTS)[:1])
    costs = Costs(alone=FlatCosts(), beside=FlatCosts())
    question = question_of(DEFAULTS, graph=model.graph, topology=topology, costs=costs)
    alone = PlannerResolver(lambda: question)
    one, why = alone.begin(None)
    assert (one.granularity, why.partition(":")[0]) == (1, "2 stages cannot be")
    with pytest.raises(NoFeasiblePlan, match="at most 1 stage"):
        alone.begin(2)  # what is asked for is not replaced by something else


def test_each_plan_begins_with_what_the_last_one_found(model: Model) -> None:
    """With no time for more than a guess, what an earlier plan found is that guess."""
    devices = [replace(device, name=f"kind {index}") for index, device in enumerate(devices_of(DEFAULTS))]
    slow_first = FlatCosts(slowness={"kind 0": 9.0, "kind 1": 9.0})
    question = question_of(
        DEFAULTS,
        graph=model.graph,
        topology=HostTopology(host_id="h", devices=tuple(devices)),
        costs=Costs(alone=slow_first, beside=slow_first),
    )
    late = itertools.count(0.0, 100.0)
    no_time = PlannerResolver(lambda: question, clock=late.__next__)
    assert no_time.first(2).device_ids == ("cpu:0", "cpu:1")
    # time stands still for the first plan, then it is over
    clock = itertools.chain(itertools.repeat(0.0, 1000), late)
    asked = PlannerResolver(lambda: question, clock=clock.__next__)
    found = asked.first(2)
    assert not {"cpu:0", "cpu:1"} & set(found.device_ids)
    assert next(clock) == 0.0
    for _ in itertools.takewhile(lambda now_s: now_s == 0.0, clock):
        pass
    assert asked.first(2) == found


def test_what_cannot_be_is_refused_in_words(resolver: PlannerResolver) -> None:
    current = resolver.first(1)
    with pytest.raises(NoFeasiblePlan, match="at most 8 stages"):
        resolver.resolve(Wanted(stages=12), current=current)
    with pytest.raises(InvalidLayout, match="not valid JSON"):
        resolver.resolve(Wanted(layout="two"), current=current)


def test_a_second_instance_needs_room_beside_the_first(resolver: PlannerResolver) -> None:
    kv = KvBudget(block_tokens=16, capacity_blocks=1024)
    check = resolver.check_second(current=resolver.first(2), target=resolver.first(2), kv=kv)
    assert check.fits
    assert [device.needed_bytes for device in check.devices] == [device.held_bytes for device in check.devices]


RANKS = (("cpu:0",), ("cpu:1",), ("cpu:2",), ("cpu:3",))


@pytest.mark.parametrize("stages", [2, 3])
def test_resident_ranks_are_planned_on_with_both_ends(resolver: PlannerResolver, stages: int) -> None:
    current = pipeline_of(device_ids=[group[0] for group in RANKS], cuts=[2, 4, 6], num_decoders=8)
    target = resolver.resolve(Wanted(stages=stages), current=current, resident=RANKS)
    assert (target.granularity, target.device_ids[0], target.device_ids[-1]) == (stages, "cpu:0", "cpu:3")


def test_more_stages_than_ranks_are_planned_for_another_instance(resolver: PlannerResolver) -> None:
    current = pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8)
    assert resolver.resolve(Wanted(stages=8), current=current, resident=RANKS[:2]).granularity == 8
    assert resolver.resolve(Wanted(stages=1), current=current, resident=RANKS[:2]).granularity == 1


def test_ranks_of_two_devices_stay_together(resolver: PlannerResolver) -> None:
    groups = (("cpu:0", "cpu:1"), ("cpu:2", "cpu:3"), ("cpu:4", "cpu:5"))
    stages = tuple(
        Stage(device_ids=group, first_decoder=first, end_decoder=end)
        for group, first, end in zip(groups, (0, 3, 6), (3, 6, 8), strict=True)
    )
    target = resolver.resolve(Wanted(stages=2), current=Pipeline(stages=stages), resident=groups)
    assert [stage.device_ids for stage in target.stages] == [groups[0], groups[2]]


def test_the_return_to_compiled_code_is_logged_and_told(model: Model) -> None:
    news: list[str] = []
    factory = engine_factory(vllm_settings(compile=True), model, on_news=news.append)
    engine = factory(pipeline_of(device_ids=["cpu:0", "cpu:1"], cuts=[4], num_decoders=8), 0)
    again = Recompilation(compiled=True, ranks=(0, 1), duration_s=9.5, compile_s=8.0, load_s=0.05, stall_s=0.0612)
    eager = Recompilation(compiled=False, ranks=(1,), duration_s=1.0, reason="no compiler")
    with capture_logs() as logs:
        engine.on_recompiled(again)
        engine.on_recompiled(eager)
    assert news == [again.message, eager.message]
    assert logs == [
        {
            "event": "compiled again after a move", "log_level": "info", "ranks": [0, 1], "after_s": 9.5,
            "compile_s": 8.0, "load_stall_s": 0.0612,
        },
        {"event": "stays eager after a move", "log_level": "warning", "ranks": [1], "reason": "no compiler"},
    ]  # fmt: skip
