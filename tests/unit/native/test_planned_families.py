"""The planner's families against transformers' own models: the same tensors, of the same shapes."""

from math import prod

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planner.model_graph import build_model_graph
from tests.support.graphs import headers
from tests.support.published_models import OPT_66B, PUBLISHED


def shapes_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the parameters of transformers' model, on the meta device; a tied table once."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **values))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_two_decoders_of_each_family_have_the_tensors_that_transformers_has(name: str) -> None:
    config = {**PUBLISHED[name].config, "num_hidden_layers": 2}
    theirs, ours = shapes_of(config), {name: header.shape for name, header in headers(config).items()}
    if config["model_type"] == "gpt_neox":  # so it is called in memory alone
        theirs["embed_out.weight"] = theirs.pop("lm_head.weight")
    fused = [each for each in theirs if ".experts." in each]  # kept in one tensor in memory, apart in checkpoints
    if not fused:
        assert ours == theirs
    assert sum(map(prod, ours.values())) == sum(map(prod, theirs.values()))


def test_the_parameters_of_opt_66b_are_those_that_transformers_counts() -> None:
    counted = sum(map(prod, shapes_of(dict(OPT_66B.config)).values()))
    assert counted == OPT_66B.parameters
    assert build_model_graph(OPT_66B.config).total_weight_bytes == 2 * counted
