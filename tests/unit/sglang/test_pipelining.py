"""Which models SGLang runs in one pipeline rank only, and who says so before anything is started."""

from dataclasses import replace
from pathlib import Path

import pytest

from engines.errors import EngineStartFailed, UnsupportedByEngine
from engines.sglang.pipelining import ensure_no_pipeline_of_vectors, on_every_rank, one_rank_reason
from flexpiped.engine_factory import engine_factory, find_files
from flexpiped.models import model_source
from flexpiped.planner_question import engine_limits
from flexpiped.settings import EngineKind, EnginesSettings, Settings, SglangSettings
from planner.layout import pipeline_of
from planner.model_graph import LayerKind
from tests.support.daemon import run_until_exit, write_config
from tests.support.lone_flexctl import alone
from topology.device import cpu_devices
from topology.units import MIB

WORDS = "in one pipeline rank only"
DEVICES = cpu_devices(count=8, memory_bytes=512 * MIB)
SETTINGS = replace(Settings(), engine=EngineKind.SGLANG)
SGLANG = '[engines.sglang]\npython = "/nowhere/bin/python"\n'  # were it started, that would be the reason


@pytest.mark.parametrize(
    ("model_type", "tied", "refused"),
    [("llama", True, True), ("llama", False, False), ("mistral", True, True), ("qwen3", True, False)],
)
def test_it_is_the_family_and_its_head(model_type: str, tied: bool, refused: bool) -> None:
    reason = one_rank_reason(model_type, tied=tied)
    assert (WORDS in reason) is refused
    assert ("set stages = 1" in reason) is refused


@pytest.mark.parametrize("flag", ["--is-embedding", "--is_embedding"])
def test_what_only_embeds_has_one_rank_whatever_its_family(flag: str) -> None:
    assert WORDS in one_rank_reason("qwen3", tied=False, args=["--watchdog-timeout=60", flag])
    assert one_rank_reason("qwen3", tied=False, args=["--watchdog-timeout=60"]) == ""
    told = {"pp_size": 2, "generates": False}  # by SGLang, which has found it in config.json
    with pytest.raises(EngineStartFailed, match=WORDS):
        ensure_no_pipeline_of_vectors(told)
    for fine in ({"pp_size": 1, "generates": False}, {"pp_size": 2}):
        ensure_no_pipeline_of_vectors(fine)


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("llama", {LayerKind.HEAD}),
        ("mixtral", {LayerKind.HEAD}),
        ("qwen3", set()),
        ("unheard_of", {LayerKind.EMBEDDING, LayerKind.HEAD}),
    ],
)
def test_what_each_rank_holds_goes_by_the_family(model_type: str, kinds: set[LayerKind]) -> None:
    assert on_every_rank(model_type) == kinds


def test_the_graph_says_what_its_engine_has_on_every_rank() -> None:
    found = {
        engine: find_files(replace(SETTINGS, engine=engine), source=model_source(SETTINGS)).graph.on_every_stage
        for engine in (EngineKind.NATIVE, EngineKind.VLLM, EngineKind.SGLANG)
    }
    assert set(found.values()) == {frozenset(), frozenset({LayerKind.HEAD})}
    assert found[EngineKind.SGLANG] == {LayerKind.HEAD}


def test_the_planner_is_told_and_no_engine_is_made_with_more_ranks() -> None:
    model = find_files(SETTINGS, source=model_source(SETTINGS))
    assert engine_limits(SETTINGS, graph=model.graph, devices=DEVICES).max_stages == 1
    untied = replace(model.graph, shared_bytes=0)
    limits = engine_limits(SETTINGS, graph=untied, devices=DEVICES)
    assert (limits.max_stages, limits.stages_reason) == (8, "")

    one = pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8)
    assert engine_factory(SETTINGS, model)(one, 0).pipeline == one
    more = replace(SETTINGS, engines=EnginesSettings(sglang=SglangSettings(ranks=2)))
    with pytest.raises(UnsupportedByEngine, match=rf"engines\.sglang\.ranks ask for 2 .*{WORDS}"):
        engine_factory(more, model)(one, 0)
    embeds = replace(SETTINGS, engines=EnginesSettings(sglang=SglangSettings(args=("--is-embedding",))))
    assert engine_limits(embeds, graph=untied, devices=DEVICES).max_stages == 1


@pytest.mark.real_loop
async def test_the_daemon_refuses_the_demo_model_in_two_stages_before_it_starts_anything(tmp_path: Path) -> None:
    code, said = await run_until_exit(write_config(tmp_path, engine="sglang", stages=2, more=SGLANG))
    assert (code, WORDS in said, "/nowhere" in said) == (1, True, False), said


def test_flexctl_plan_says_so(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(f'engine = "sglang"\n{SGLANG}', encoding="utf-8")
    refused = alone(tmp_path, "plan", "--config", str(tmp_path / "my.toml"), "--stages", "2")
    assert refused.returncode == 4
    explained = alone(tmp_path, "plan", "--config", str(tmp_path / "my.toml"), "--explain")
    assert explained.stdout.startswith("chosen  1 stage on cpu:0")
    for shown in (refused.stderr + refused.stdout, explained.stdout):
        assert WORDS in " ".join(shown.split())
