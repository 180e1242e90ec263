"""What vLLM has on every pipeline rank."""

import pytest

from engines.vllm.pipelining import on_every_rank
from planner.model_graph import LayerKind


@pytest.mark.parametrize(
    ("model_type", "divided"),
    [("llama", True), ("qwen3", True), ("mixtral", False), ("gpt2", False), ("unheard_of", False)],
)
def test_it_goes_by_the_family(model_type: str, divided: bool) -> None:
    assert on_every_rank(model_type) == (set() if divided else {LayerKind.EMBEDDING, LayerKind.HEAD})
