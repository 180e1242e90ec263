"""The installer of environments for real engines: once, whole or not at all, and clear about what is in the way."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.environment import CannotInstall, Ended, Installer, Recipe, main
from tests.engines.install_sglang import SGLANG
from tests.engines.install_vllm import VLLM

OFFLINE = "WARNING: Retrying: NewConnectionError('...: Temporary failure in name resolution')\nERROR: No way"


class FakeCommands:
    """Does what venv, pip and the check would, in a few files; ``fails`` gives an output to those that are to fail."""

    def __init__(self, fails: Callable[[Sequence[str]], str] = lambda _argv: "") -> None:
        self.fails = fails
        self.done: list[Sequence[str]] = []
        self.version = "0.32.0"

    def __call__(self, argv: Sequence[str], _env: Mapping[str, str], _lock: int) -> Ended:
        self.done.append(argv)
        if output := self.fails(argv):
            return Ended(status=1, output=output)
        if "venv" in argv:
            make_environment(Path(argv[-1]))
        return Ended(status=0, output=self.version if "-c" in argv else "")

    @property
    def kinds(self) -> list[str]:
        return ["check" if "-c" in argv else argv[3] for argv in self.done]


def make_environment(directory: Path) -> None:
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").touch()
    (directory / "lib" / "python3.11" / "site-packages").mkdir(parents=True)


class Rig:
    def __init__(self, parent: Path) -> None:
        self.directory = parent / "cache" / "vllm"
        self.requirements = parent / "requirements.txt"
        self.requirements.write_text("# why\ntorch==2.13.0+cpu\nvllm-cpu==0.32.0\neinops==0.8.2\n")
        self.commands = FakeCommands()
        self.said: list[str] = []
        self.free_bytes = VLLM.needed_bytes

    def ensure(self) -> Path:
        return Installer(
            recipe=replace(VLLM, requirements=self.requirements),
            directory=self.directory,
            run=self.commands,
            say=self.said.append,
            free_bytes=lambda _path: self.free_bytes,
        ).ensure()


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_builds_once_and_says_how_long_and_how_large(rig: Rig) -> None:
    python = rig.ensure()

    assert python == rig.directory / "bin" / "python"
    assert rig.commands.kinds == ["venv", "pip", "pip", "check"]
    assert [line for line in rig.said if "two minutes" in line and "2.5 GB" in line] == rig.said[:1]
    assert {path.name for path in rig.directory.iterdir()} == {"bin", "lib", "flexpiped-complete"}


def test_is_silent_where_there_is_nothing_to_do(rig: Rig) -> None:
    rig.ensure()
    rig.commands.done.clear()
    rig.said.clear()

    rig.ensure()

    assert (rig.commands.done, rig.said) == ([], [])


def test_what_was_interrupted_is_built_anew(rig: Rig) -> None:
    def interrupt(argv: Sequence[str]) -> str:
        if "--requirement" in argv:
            raise KeyboardInterrupt
        return ""

    rig.commands.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.ensure()
    assert (rig.directory / "flexpiped-building").exists()
    rig.commands = FakeCommands()

    rig.ensure()

    assert rig.commands.kinds == ["venv", "pip", "pip", "check"]


def test_what_was_built_by_other_pins_is_built_anew(rig: Rig) -> None:
    rig.ensure()
    rig.requirements.write_text(rig.requirements.read_text() + "six==1.17.0\n")
    rig.commands.done.clear()

    rig.ensure()

    assert "venv" in rig.commands.kinds


def test_an_environment_that_works_is_taken_over_as_it_is(rig: Rig) -> None:
    make_environment(rig.directory)

    rig.ensure()
    rig.ensure()

    assert rig.commands.kinds == ["check"]


def test_what_is_not_ours_is_never_removed(rig: Rig) -> None:
    rig.directory.mkdir(parents=True)
    (rig.directory / "thesis.txt").touch()

    with pytest.raises(CannotInstall, match=r"remove .* or name another directory"):
        rig.ensure()

    assert [path.name for path in rig.directory.iterdir()] == ["thesis.txt"]


def test_another_version_of_vllm_is_not_taken_over(rig: Rig) -> None:
    make_environment(rig.directory)
    rig.commands.version = "0.31.0"

    with pytest.raises(CannotInstall, match=r"has vLLM 0\.31\.0, not 0\.32\.0"):
        rig.ensure()


def test_two_builds_at_once_are_one(rig: Rig) -> None:
    second = Rig(rig.requirements.parent)
    waits = threading.Event()
    second.said = Waited(waits)
    other = threading.Thread(target=second.ensure)

    def begin_the_other(argv: Sequence[str]) -> str:
        if "venv" in argv:
            other.start()
            assert waits.wait(10)
        return ""

    rig.commands.fails = begin_the_other
    rig.ensure()
    other.join(10)

    assert rig.commands.kinds == ["venv", "pip", "pip", "check"]
    assert second.commands.done == []
    assert second.said == [f"waiting for another build of {rig.directory}"]


class Waited(list[str]):
    """What was said; sets ``event`` when it is the first."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self.event = event

    def append(self, line: str) -> None:
        super().append(line)
        self.event.set()


def test_torch_comes_from_its_own_index_where_the_configured_one_has_no_cpu_build(rig: Rig) -> None:
    def only_pypi(argv: Sequence[str]) -> str:
        asked = "torch==2.13.0+cpu" in argv and "--index-url" not in argv
        return "ERROR: No matching distribution found for torch==2.13.0+cpu" if asked else ""

    rig.commands.fails = only_pypi

    rig.ensure()

    assert rig.commands.kinds == ["venv", "pip", "pip", "pip", "check"]


@pytest.mark.parametrize(
    ("fails_in", "output", "reason"),
    [
        ("pip", OFFLINE, "is there a network"),
        ("pip", "ERROR: OSError: [Errno 28] No space left on device", "disk is full"),
        ("venv", "The virtual environment was not created because ensurepip is not available", "python3-venv"),
        ("-c", "ImportError: libnuma.so.1", "libnuma"),
    ],
)
def test_says_what_is_in_the_way(rig: Rig, fails_in: str, output: str, reason: str) -> None:
    rig.commands.fails = lambda argv: output if fails_in in argv else ""

    with pytest.raises(CannotInstall, match=reason):
        rig.ensure()
    assert not rig.directory.exists()


def test_looks_at_the_free_space_before_anything_is_written(rig: Rig) -> None:
    rig.free_bytes = VLLM.needed_bytes - 1

    with pytest.raises(CannotInstall, match=r"too little space.*XDG_CACHE_HOME"):
        rig.ensure()
    assert not rig.directory.exists()


@pytest.mark.parametrize("recipe", [VLLM, SGLANG], ids=lambda recipe: recipe.package)
def test_an_interpreter_that_is_named_is_taken_or_missed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    monkeypatch.setenv(recipe.variable, str(python))

    assert main(recipe, []) == 1
    assert f"make test ENGINES=native leaves out what needs {recipe.name}" in capsys.readouterr().err
    python.touch()
    assert main(recipe, []) == 0
    assert capsys.readouterr() == (f"{python}\n", "")


def test_sglang_computes_with_torch_instead_of_its_kernels(tmp_path: Path) -> None:
    make_environment(tmp_path)
    [packages] = tmp_path.glob("lib/python3.*/site-packages")
    (packages / "torchvision").mkdir()

    SGLANG.finish(packages)

    assert (packages / "sgl_kernel" / "__init__.py").read_bytes() == SGLANG.parts[0].read_bytes()
    assert (packages / "torchvision" / "_meta_registrations.py").read_text() == ""


@pytest.mark.parametrize("recipe", [VLLM, SGLANG], ids=lambda recipe: recipe.package)
def test_every_package_of_an_engine_is_pinned_once(recipe: Recipe) -> None:
    lines = recipe.requirements.read_text().splitlines()
    pins = [line.partition("==") for line in lines if line and not line.startswith("#")]

    assert all(name and version for name, _, version in pins)
    assert len({name.lower().replace("_", "-") for name, _, _ in pins}) == len(pins)
