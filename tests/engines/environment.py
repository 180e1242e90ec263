"""Builds an environment for tests of a real engine, once: whole or not at all, and clear about what is in the way.

    absent or empty ------------------build---> building --it works--> complete
    building, or complete by other pins --remove, build--^                 ^
    not built here ----------------------------------------it works--------+   (else refused: it is not ours to remove)

A file in the directory says which: `flexpiped-building` is there before anything else, `flexpiped-complete`, with a
fingerprint of the pins, comes last. A virtual environment cannot be moved, so it is built where it stays, under a lock
beside it.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CPU_BUILDS = "https://download.pytorch.org/whl/cpu"  # where torch's CPU builds are, if the configured index has none
NO_NETWORK = ("NewConnectionError", "ConnectTimeout", "name resolution", "Max retries exceeded")


class CannotInstall(Exception):
    """The environment is not there and cannot be built; the message is for the person who typed the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended, with what it wrote."""

    status: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one engine needs. ``finish`` writes into its site-packages what no package brings."""

    name: str  # for people
    package: str
    version: str
    requirements: Path  # pins of all packages, torch among them
    check: str  # a program whose last word is the version, when the engine works
    size: str  # of the build, in words
    needed_bytes: int  # while building: pip unpacks beside what stays
    pythons: tuple[tuple[int, int], tuple[int, int]]  # the oldest and the newest that have wheels of all
    machines: tuple[str, ...]
    finish: Callable[[Path], None]
    parts: tuple[Path, ...] = ()  # what ``finish`` copies

    @property
    def variable(self) -> str:
        """The environment variable that names an interpreter which has the engine."""
        return f"FLEXPIPED_{self.package.upper()}_PYTHON"

    @property
    def directory(self) -> Path:
        """Where it is built by default."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache) / "flexpiped" / f"{self.package}-{self.version}"


Run = Callable[[Sequence[str], Mapping[str, str], int], Ended]


def run_command(argv: Sequence[str], env: Mapping[str, str], lock: int) -> Ended:
    """Run a command that holds the lock too: were we killed, nobody may build while an orphaned pip still writes."""
    done = subprocess.run(
        argv,
        env=env,
        pass_fds=(lock,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return Ended(status=done.returncode, output=done.stdout)


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_bytes(path: Path) -> int:
    """Return what is free where ``path`` is, or would be."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


@dataclass(kw_only=True)
class Installer:
    """Brings one directory to `complete`; how commands run and how much room there is can be replaced in tests."""

    recipe: Recipe
    directory: Path
    run: Run = run_command
    say: Callable[[str], None] = say_on_stderr
    free_bytes: Callable[[Path], int] = free_bytes
    started_s: float = field(default_factory=time.monotonic)

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    @property
    def building(self) -> Path:
        return self.directory / "flexpiped-building"

    @property
    def complete(self) -> Path:
        return self.directory / "flexpiped-complete"

    def fingerprint(self) -> str:
        files = (self.recipe.requirements, *self.recipe.parts)
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def is_complete(self) -> bool:
        try:
            return self.complete.read_text(encoding="ascii") == self.fingerprint() and self.python.exists()
        except (FileNotFoundError, NotADirectoryError):
            return False

    def ensure(self) -> Path:
        """Return the interpreter, after building its environment where that is needed.

        Raises:
            CannotInstall: It cannot be built here.
            OSError: The directory cannot be written.
        """
        if self.is_complete():
            return self.python
        with self._lock() as lock:
            if self.is_complete():  # somebody else built it meanwhile
                return self.python
            if self.building.exists() or self.complete.exists():
                self.say(f"removing {self.directory}: interrupted, or built by other pins")
                shutil.rmtree(self.directory)
            if self.directory.exists() and any(self.directory.iterdir()):
                self._accept(lock)
            else:
                self._build(lock)
        return self.python

    @contextmanager
    def _lock(self) -> Iterator[int]:
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        path = self.directory.with_name(f"{self.directory.name}.lock")
        with path.open("w") as file:  # stays there: removing a lock file makes two locks of one
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"waiting for another build of {self.directory}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno()

    def _accept(self, lock: int) -> None:
        what = f"{self.recipe.name} {self.recipe.version}"
        self.say(f"{self.directory} was not built by this program: looking whether {what} works there")
        try:
            self._check(lock)
        except CannotInstall as error:
            raise CannotInstall(f"{error}\nremove {self.directory} or name another directory") from error
        self._write_complete()

    def _build(self, lock: int) -> None:
        self._ensure_possible()
        recipe = self.recipe
        self.say(f"building {recipe.name} {recipe.version} for the CPU: once, {recipe.size}, in {self.directory}")
        self.directory.mkdir(exist_ok=True)
        self.building.touch()
        try:
            self._fill(lock)
        except CannotInstall:
            shutil.rmtree(self.directory)
            raise
        self._write_complete()
        self.building.unlink()
        self._step("done")

    def _fill(self, lock: int) -> None:
        temporary = self.directory / "tmp"  # pip's, on the file system whose free space was looked at
        temporary.mkdir()
        self._step("virtual environment")
        self._do(lock, sys.executable, "-I", "-m", "venv", str(self.directory))
        self._install_torch(lock)
        self._step(f"{self.recipe.name} and {len(self._pins()) - 2} packages that it needs")
        self._pip(lock, "--requirement", str(self.recipe.requirements))
        [packages] = self.directory.glob("lib/python3.*/site-packages")
        self.recipe.finish(packages)
        self._step("looking whether it works")
        self._check(lock)
        shutil.rmtree(temporary)

    def _ensure_possible(self) -> None:
        version, what = sys.version_info[:2], f"{self.recipe.name} {self.recipe.version}"
        oldest, newest = self.recipe.pythons
        if not oldest <= version <= newest:
            raise CannotInstall(
                f"there are no wheels of {what} for Python {version[0]}.{version[1]}: {oldest[0]}.{oldest[1]} to "
                f"{newest[0]}.{newest[1]} is needed (make clean, then make test PYTHON=python3.12)"
            )
        if platform.machine() not in self.recipe.machines:
            raise CannotInstall(f"there are no wheels of {what} for {platform.machine()}")
        free, needed = self.free_bytes(self.directory), self.recipe.needed_bytes
        if free < needed:
            raise CannotInstall(
                f"too little space for {self.directory}: {free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are "
                "needed to build (XDG_CACHE_HOME=DIR puts it elsewhere)"
            )

    def _pins(self) -> list[str]:
        lines = self.recipe.requirements.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    def _install_torch(self, lock: int) -> None:
        torch = next(pin for pin in self._pins() if pin.startswith("torch=="))
        self._step(f"{torch}, about 200 MB")
        try:
            self._pip(lock, torch)
        except CannotInstall as error:
            if "No matching distribution" not in str(error):
                raise
            self._step(f"the configured index has no CPU build: from {CPU_BUILDS}")
            self._pip(lock, "--index-url", CPU_BUILDS, torch)

    def _pip(self, lock: int, *arguments: str) -> None:
        options = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-deps", "--only-binary=:all:")
        self._do(lock, str(self.python), "-I", "-m", "pip", "install", *options, *arguments)

    def _check(self, lock: int) -> None:
        if not self.python.exists():
            raise CannotInstall(f"there is no {self.python}")
        name, version = self.recipe.name, self.recipe.version
        answer = self._do(lock, str(self.python), "-I", "-c", self.recipe.check).split()
        if not answer or not answer[-1].startswith(version):
            raise CannotInstall(f"{self.python} has {name} {answer[-1] if answer else '?'}, not {version}")

    def _write_complete(self) -> None:
        unfinished = self.complete.with_suffix(".new")
        unfinished.write_text(self.fingerprint(), encoding="ascii")
        unfinished.replace(self.complete)

    def _do(self, lock: int, *argv: str) -> str:
        ended = self.run(argv, self._environment(), lock)
        if ended.status:
            raise CannotInstall(reason_of(ended, argv))
        return ended.output

    def _environment(self) -> dict[str, str]:
        """Return ours, without what would lead pip to another place than the virtual environment."""
        leading_away = {"PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"}
        kept = {name: value for name, value in os.environ.items() if name not in leading_away}
        return kept | {"TMPDIR": str(self.directory / "tmp")} if self.building.exists() else kept

    def _step(self, what: str) -> None:
        self.say(f"  {time.monotonic() - self.started_s:3.0f} s  {what}")


def reason_of(ended: Ended, argv: Sequence[str]) -> str:
    """Return why a command failed, for people: the cause where it is a known one, then the command's last lines."""
    lines = [line.strip() for line in ended.output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    told = "\n".join(f"  {line}" for line in errors[-5:])
    if "No space left on device" in ended.output:
        cause = "the disk is full"
    elif any(sign in ended.output for sign in NO_NETWORK):
        cause = "no package index answers: is there a network?"
    elif "ensurepip" in ended.output:
        cause = "this Python cannot make virtual environments: install its venv package (python3-venv)"
    else:
        cause = f"{' '.join(argv[:4])} ... ended with {ended.status}"
    return f"{cause}\n{told}" if told else cause


def main(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Print an interpreter that has the engine, after building its environment where that is needed."""
    parser = argparse.ArgumentParser(
        description=f"Build real {recipe.name} for the CPU, for tests, and print its interpreter."
    )
    parser.add_argument("directory", nargs="?", type=Path, help=f"default: {recipe.directory}")
    directory = parser.parse_args(arguments).directory
    named = "" if directory else os.environ.get(recipe.variable, "")
    try:
        if named and not Path(named).is_file():
            raise CannotInstall(f"{recipe.variable}: there is no {named}")
        print(named or Installer(recipe=recipe, directory=(directory or recipe.directory).absolute()).ensure())
    except (CannotInstall, OSError) as error:
        say_on_stderr(f"no {recipe.name} for the tests: {error}")
        say_on_stderr(
            f"make test ENGINES=native leaves out what needs {recipe.name}, ENGINES=none all that boots an engine"
        )
        return 1
    except KeyboardInterrupt:
        return 130  # the next call removes what is half done
    return 0
