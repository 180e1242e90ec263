"""Commands that need no daemon: the same cause ends each of them with the same code, in words and as JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.lone_flexctl import alone

pytestmark = pytest.mark.real_loop
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


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_that_cannot_be_read_is_usage(tmp_path: Path, command: str) -> None:
    ran = alone(tmp_path, command, "--config", str(tmp_path / "nope.toml"), "--json")
    assert (ran.returncode, ran.stderr) == (2, "")
    error = json.loads(ran.stdout)["error"]
    assert (error["code"], "nope.toml: cannot be read" in error["message"]) == ("bad_input", True)
