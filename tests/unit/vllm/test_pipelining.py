"""What vLLM has on every pipeline rank, and which models it runs in one only: told before anything is started."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engines.errors import UnsupportedByEngine
from engines.vllm.pipelining import on_every_rank, one_rank_reason
from flexpiped.config_values import Auto
from flexpiped.engine_factory import engine_factory, find_files
from flexpiped.handover_records import Wanted
from flexpiped.planner_question import question_here
from flexpiped.settings import EngineKind, EnginesSettings, Settings, VllmSettings
from flexpiped.target_resolver import PlannerResolver
from planner.errors import NoFeasiblePlan
from planner.layout import Pipeline, pipeline_of
from planner.model_graph import LayerKind
from tests.support.daemon import run_until_exit, write_config
from tests.support.lone_flexctl import alone

WORDS = "vLLM runs bert models in one pipeline rank only"
VLLM = '[engines.vllm]\npython = "/nowhere/bin/python"\n'  # were it started, that would be the reason
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 4, "hidden_size": 32,
    "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "divided"),
    [("llama", True), ("qwen3", True), ("mixtral", False), ("gpt2", False), ("unheard_of", False)],
)
def test_it_goes_by_the_family(model_type: str, divided: bool) -> None:
    assert on_every_rank(model_type) == (set() if divided else {LayerKind.EMBEDDING, LayerKind.HEAD})


@pytest.mark.parametrize(
    ("args", "refused"),
    [
        ((), True),
        (("--runner", "pooling", "--model-impl", "vllm"), True),
        (("--model-impl", "transformers"), False),  # which vLLM cuts by itself
        (("--model_impl=transformers",), False),
    ],
)
def test_an_encoder_has_one_rank_unless_its_class_is_that_of_transformers(args: tuple[str, ...], refused: bool) -> None:
    assert one_rank_reason("bert", args=args).startswith(WORDS) is refused
    assert one_rank_reason("llama", args=args) == ""


@pytest.fixture
def bert(tmp_path: Path) -> str:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT), encoding="utf-8")
    names = [f"encoder.layer.{index}.attention.self.query.weight" for index in range(4)]
    save_file({name: torch.zeros(32, 32) for name in names}, folder / "model.safetensors")
    return str(folder)


def one(stages: int = 1) -> Pipeline:
    cuts = list(range(1, stages))
    return pipeline_of(device_ids=[f"cpu:{index}" for index in range(stages)], cuts=cuts, num_decoders=4)


def test_what_rebalance_asks_for_is_refused_by_name(bert: str) -> None:
    """By a number of stages, by a layout, by the daemon's own choice, and by the configuration's number of ranks."""
    settings = replace(Settings(model=bert), engine=EngineKind.VLLM)
    model = find_files(settings, source=bert)
    resolver = PlannerResolver(lambda: question_here(settings, model.graph))
    for wanted in (Wanted(stages=2), Wanted(stages=2, replica=True)):
        with pytest.raises(NoFeasiblePlan, match=WORDS):
            resolver.resolve(wanted, current=one())
    assert resolver.broken_rules(one(2), current=one())[0].startswith(WORDS)
    assert resolver.resolve(Wanted(), current=one()).granularity == 1
    assert resolver.begin(None)[0].granularity == 1
    assert resolver.first(Auto.AUTO).granularity == 1

    more = replace(settings, engines=EnginesSettings(vllm=VllmSettings(ranks=2)))
    with pytest.raises(UnsupportedByEngine, match=rf"engines\.vllm\.ranks ask for 2 pipeline ranks: {WORDS}"):
        engine_factory(more, model)(one(), 0)


@pytest.mark.real_loop
async def test_the_daemon_refuses_an_encoder_in_two_stages_before_it_starts_anything(tmp_path: Path, bert: str) -> None:
    code, said = await run_until_exit(write_config(tmp_path, engine="vllm", stages=2, more=f'model = "{bert}"\n{VLLM}'))
    assert (code, WORDS in said, "/nowhere" in said) == (1, True, False), said


@pytest.mark.real_loop
def test_flexctl_plan_says_so(tmp_path: Path, bert: str) -> None:
    (tmp_path / "my.toml").write_text(f'model = "{bert}"\nengine = "vllm"\n{VLLM}', encoding="utf-8")
    refused = alone(tmp_path, "plan", "--config", str(tmp_path / "my.toml"), "--stages", "2")
    assert refused.returncode == 4
    assert WORDS in " ".join((refused.stderr + refused.stdout).split())
