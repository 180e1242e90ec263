"""The table of commands, and what is made of it: completions that shells take, manual pages that groff takes."""

import argparse
import shutil
import subprocess
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path

import pytest

from flexpiped.flexctl.client import AdminClient
from flexpiped.flexctl.completion_command import completion
from flexpiped.flexctl.man_page import flexctl_page, flexpiped_page
from flexpiped.flexctl.parser import COMMANDS, Command, Late, flexctl_parser
from flexpiped.flexctl.parser_walk import subcommands_of
from flexpiped.flexctl.terminal import Screen


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def leaves(rows: tuple[Command, ...]) -> Iterator[Command]:
    for row in rows:
        yield from leaves(row.parts) if row.parts else (row,)


def test_every_command_has_what_it_runs() -> None:
    assert [row.name for row in leaves(COMMANDS) if row.run is None] == []
    names = [row.name for row in COMMANDS]
    assert len(names) == len(set(names))


def test_every_command_is_run_with_a_client_a_screen_and_options() -> None:
    runs = [row.run.load() if isinstance(row.run, Late) else row.run for row in leaves(COMMANDS)]
    for run in runs:
        assert run is not None
        signature(run).bind(None, None, None)


def test_every_command_is_in_the_manual_with_its_options() -> None:
    page = flexctl_page()

    for name, meaning, _ in subcommands_of(flexctl_parser()):
        assert f".SS {name}" in page, name
        assert meaning
    assert "\\fB\\-\\-dry\\-run\\fR" in page
    assert "argparse.SUPPRESS" not in page


@needs("groff")
@pytest.mark.parametrize("page", [flexctl_page, flexpiped_page])
def test_groff_has_nothing_to_say(page: Callable[[], str]) -> None:
    ran = subprocess.run(["groff", "-man", "-ww", "-Tutf8"], input=page(), capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")


def script(shell: str, folder: Path) -> Path:
    file = folder / shell
    with file.open("w") as out:
        completion(AdminClient(()), Screen(out, environment={}), argparse.Namespace(shell=shell))
    return file


@needs("bash")
@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (["flexctl", "reb"], {"rebalance"}),
        (["flexctl", "rebalance", "--dry"], {"--dry-run"}),
        (["flexctl", "rebalance", "--engine", "v"], {"vllm"}),
        (["flexctl", "config", "s"], {"show", "schema"}),
        (["flexctl", "auto", ""], {"on", "off", "dry-run"}),
    ],
)
def test_bash_completes(words: list[str], answers: set[str], tmp_path: Path) -> None:
    quoted = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script('bash', tmp_path)}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        f"_shtab_flexctl; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )

    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)

    assert ran.stderr == ""
    assert answers <= {answer.strip() for answer in ran.stdout.split()}


@needs("zsh")
def test_zsh_takes_its_script(tmp_path: Path) -> None:
    """It is found by the name of its file, and defines what completes."""
    file = script("zsh", tmp_path).rename(tmp_path / "_flexctl")
    program = f"fpath=({tmp_path} $fpath); autoload -Uz compinit && compinit -D -u; print -r -- $_comps[flexctl]"

    parsed = subprocess.run(["zsh", "-f", "-n", file], capture_output=True, text=True, check=False)
    found = subprocess.run(["zsh", "-f", "-c", program], capture_output=True, text=True, check=False)

    assert (parsed.returncode, parsed.stderr) == (0, "")
    assert (found.stdout, found.stderr) == ("_flexctl\n", "")
