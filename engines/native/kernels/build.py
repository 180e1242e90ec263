"""Compiles the kernels for this machine with the C compiler that is here, once, and caches the result."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

_COMPILE = ("-c", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
# Linked apart: with -ffast-math here, loading the library would have the whole process flush subnormal numbers to zero.
_LINK = ("-shared", "-fopenmp", "-lm")


class KernelBuildFailed(Exception):
    """There is no compiler, or it refused; the message has its last words. The torch path works without."""


def cache_directory(configured: str) -> Path:
    """Return where compiled kernels are kept."""
    if configured:
        return Path(configured)
    base = os.environ.get("CACHE_DIRECTORY") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flexpiped" / "kernels"


def build_kernel(name: str, *, directory: Path) -> Path:
    """Return the shared library built from ``name``.c for this processor.

    Raises:
        KernelBuildFailed: No compiler, no place to write, or a compile error.
    """
    source = Path(__file__).with_name(f"{name}.c")
    target = directory / f"{name}-{_fingerprint(source)}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise KernelBuildFailed("no C compiler found (gcc, cc, clang)")
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        code = partial.with_suffix(".o")
        _run([compiler, *_COMPILE, str(source), "-o", str(code)])
        _run([compiler, str(code), "-o", str(partial), *_LINK])
        code.unlink()
        partial.rename(target)
    except OSError as error:
        raise KernelBuildFailed(str(error)) from error
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelBuildFailed(f"{command[0]}: {done.stderr.strip()[-500:]}")


def _fingerprint(source: Path) -> str:
    """Name what the library depends on: source, flags and the processor that -march=native stands for."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = "".join(line for line in lines if line.startswith(("model name", "flags")))[:4096]
    text = source.read_text() + " ".join((*_COMPILE, *_LINK)) + platform.machine() + cpu
    return hashlib.sha256(text.encode()).hexdigest()[:16]
