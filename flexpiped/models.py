"""Which model is meant: its directory or hub id, and the name under which clients ask for it. Reads nothing of it."""

import sys
from pathlib import Path
from typing import Final

from flexpiped.settings import DEMO_MODEL, Settings

_PACKAGE_PARENT: Final = Path(__file__).resolve().parents[1]


class NoDemoModel(Exception):
    """The demo model was asked for and is not installed."""


def demo_model_places() -> tuple[Path, ...]:
    """Return where the demo model may lie: beside the package in a checkout, else where it is installed."""
    return (
        _PACKAGE_PARENT / "etc" / "demo-model",
        Path(sys.prefix) / "share" / "flexpiped" / "demo-model",
        Path("/usr/share/flexpiped/demo-model"),
    )


def model_source(settings: Settings) -> str:
    """Return the directory or hub id of the model.

    Raises:
        NoDemoModel
    """
    if settings.model != DEMO_MODEL:
        return settings.model
    for place in demo_model_places():
        if (place / "config.json").is_file():
            return str(place)
    places = ", ".join(map(str, demo_model_places()))
    raise NoDemoModel(f'the demo model is in none of {places}; set model = "PATH or hub id" in the configuration')


def served_name(settings: Settings, source: str) -> str:
    """Return the name under which clients ask for the model: as configured, else the last part of its path or id."""
    return settings.served_model_name or Path(source).name or source


def for_people(source: str) -> str:
    """Return a model's path relative to the working directory where it lies below it."""
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else source
