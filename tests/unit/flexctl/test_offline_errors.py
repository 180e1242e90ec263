"""Commands that need no daemon: the same cause ends each of them with the same code, in words and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flexpiped.engine_factory import find_files
from flexpiped.profiles import model_digest
from flexpiped.settings import Settings
from tests.support.lone_flexctl import ROOT, alone

pytestmark = pytest.mark.real_loop
DEMO = str(ROOT / "etc" / "demo-model")
COMMANDS = ("plan", "profile", "simulate")


def empty(folder: Path) -> str:
    return str(folder)


def missing(folder: Path) -> str:
    return str(folder / "nope")


def damaged(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return str(folder)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("model", "said"),
    [(missing, "no such directory: "), (empty, "has no config.json"), (damaged, "config.json is not valid JSON")],
)
def test_a_model_that_is_none_is_refused(tmp_path: Path, command: str, model: Callable[[Path], str], said: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    ran = alone(tmp_path, command, "--model", model(folder), "--json")
    assert (ran.returncode, ran.stderr) == (4, "")
    error = json.loads(ran.stdout)["error"]
    assert error["code"] == "unsupported"
    assert said in error["message"]


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_profile_of_an_older_version_is_named_with_what_to_do(tmp_path: Path, command: str) -> None:
    """Neither fails for it: both go by an estimate, and say so."""
    digest = model_digest(find_files(Settings(model=DEMO), source=DEMO).graph)
    kept = tmp_path / "state" / "flexpiped" / "profiles" / f"demo-model-float32-native-{digest}-0.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"version": 1}', encoding="utf-8")
    short = ("--duration", "5") if command == "simulate" else ()
    ran = alone(tmp_path, command, "--model", DEMO, *short)
    assert (ran.returncode, ran.stderr) == (0, "")
    said = "".join(ran.stdout.split())  # a long path is broken where the line ends
    told = f"{kept.name}: profile.version must be 2, not 1: measure again with flexctl profile"
    assert told.replace(" ", "") in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_that_cannot_be_read_is_usage(tmp_path: Path, command: str) -> None:
    ran = alone(tmp_path, command, "--config", str(tmp_path / "nope.toml"), "--json")
    assert (ran.returncode, ran.stderr) == (2, "")
    error = json.loads(ran.stdout)["error"]
    assert (error["code"], "nope.toml: cannot be read" in error["message"]) == ("bad_input", True)
