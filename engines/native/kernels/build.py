"""Compiles the kernels for this machine with the C compiler that is here, once, and caches the result."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

# Without -ffast-math: sums keep their order, on which it rests that a token's bits do not depend on the batch. Nor may
# a product be rounded in one loop and not in another: for AMD's processors GCC leaves fused operations out of some
# loops with vectors of 256 bits, as it takes that for faster, and in others that compute the same it does not.
_FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-fPIC", "-shared"),
    "--param=avoid-fma-max-bits=0",
)
_SOURCES = (
    *("vectors.h", "transpose.h", "pool.h", "linear.h", "widening.h", "panels.h", "llama_ops.h"),
    *("paged_attention.h", "attention_work.h", "attention_spans.h"),
    *("pool.c", "linear.c", "panels.c", "paged_attention.c", "attention_spans.c", "llama_ops.c", "decoder.c"),
)


class KernelBuildFailed(Exception):
    """There is no compiler, or it refused; the message has its last words. The torch path works without."""


def cache_directory(configured: str) -> Path:
    """Return where compiled kernels are kept."""
    if configured:
        return Path(configured)
    base = os.environ.get("CACHE_DIRECTORY") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "flexpiped" / "kernels"


def build_kernels(*, directory: Path) -> Path:
    """Return the shared library of all kernels, built for this processor.

    Raises:
        KernelBuildFailed: No compiler, no place to write, or a compile error.
    """
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    target = directory / f"kernels-{_fingerprint(sources)}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise KernelBuildFailed("no C compiler found (gcc, cc, clang)")
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    code = [str(source) for source in sources if source.suffix == ".c"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _run([compiler, *_FLAGS, *code, "-o", str(partial), "-lm"])
        partial.rename(target)
    except OSError as error:
        raise KernelBuildFailed(str(error)) from error
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelBuildFailed(f"{command[0]}: {done.stderr.strip()[-500:]}")


def _fingerprint(sources: list[Path]) -> str:
    """Name what the library depends on: sources, flags and the processor that -march=native stands for."""
    cpu = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = "".join(line for line in lines if line.startswith(("model name", "flags")))[:4096]
    text = "".join(source.read_text() for source in sources) + " ".join(_FLAGS) + platform.machine() + cpu
    return hashlib.sha256(text.encode()).hexdigest()[:16]
