"""What an engine's functions take: read at start, before anything of them is replaced or called."""

import inspect
from collections.abc import Callable
from typing import Any


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of its parameters, in order."""
    return list(inspect.signature(function).parameters)


def takes(function: Callable[..., Any], *names: str) -> bool:
    """Return whether its parameters are these and no others."""
    return parameters_of(function) == list(names)
