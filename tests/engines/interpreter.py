"""Where a test finds the interpreter of a real engine."""

import os
from pathlib import Path

import pytest

from tests.engines.environment import Recipe


def ensure_there(recipe: Recipe) -> str:
    """Return the interpreter that has the engine, or skip the test."""
    named = os.environ.get(recipe.variable)
    python = Path(named) if named else recipe.directory / "bin" / "python"
    if not python.is_file():
        pytest.skip(
            f"no {recipe.name}: there is no {python}; python -m tests.engines.install_{recipe.package} builds it"
        )
    return str(python)
