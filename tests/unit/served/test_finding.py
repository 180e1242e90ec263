"""Where a model has its layers, as the plugins of both engines look for them."""

import sys
from dataclasses import dataclass

import pytest
import torch

from engines.served.plugin_path import SHARED

sys.path.append(str(SHARED))  # as the interpreter of an engine has it

from flexpiped_served.finding import CannotMove, found_in


@dataclass
class Call:
    modules: torch.nn.ModuleList


class Core(torch.nn.Module):
    def __init__(self, layers: torch.nn.ModuleList, *, has_range: bool = True) -> None:
        super().__init__()
        self.layers = layers
        if has_range:
            self.start_layer, self.end_layer = 0, len(layers)


def made() -> Call:
    return Call(torch.nn.ModuleList([torch.nn.Linear(1, 1)]))


def test_the_call_and_the_module_that_runs_the_layers_are_found() -> None:
    others, ours = made(), made()
    core = Core(ours.modules)
    assert found_in(torch.nn.Sequential(torch.nn.Linear(1, 1), core), [others, ours]) == (ours, core)


@pytest.mark.parametrize("has_range", [True, False])
def test_a_model_that_makes_its_layers_in_another_way_cannot_move(has_range: bool) -> None:
    """Without a range in its forward pass, or with layers of which no call is known."""
    call = made()
    model = Core(made().modules if has_range else call.modules, has_range=has_range)
    with pytest.raises(CannotMove, match="not supported with Core"):
        found_in(model, [call])
