"""Where a model has the layers that its engine's ``make_layers`` made. Knows no engine."""

from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import torch


class CannotMove(Exception):
    """This model's layers cannot be moved; the message says why."""


class Made(Protocol):
    """One call of ``make_layers``."""

    modules: torch.nn.ModuleList


AnyMade = TypeVar("AnyMade", bound=Made)


def found_in(model: torch.nn.Module, calls: Iterable[AnyMade]) -> tuple[AnyMade, Any]:
    """Return which of ``calls`` made the layers of ``model``, and the module whose forward runs them.

    Raises:
        CannotMove
    """
    for made in calls:
        for module in model.modules():
            holds = any(child is made.modules for child in module.children())
            if holds and hasattr(module, "start_layer") and hasattr(module, "end_layer"):
                return made, module
    raise CannotMove(f"moves in place are not supported with {type(model).__name__}: it does not use make_layers")
