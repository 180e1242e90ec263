"""What the torch of an interpreter is built for, told without starting it."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def has_cpu_torch(python: Path) -> bool:
    """Return whether the torch of an interpreter is built for the CPU, by the version under which it is installed."""
    if str(python) == sys.executable:
        return _own_version().endswith("+cpu")
    return any(python.parent.parent.glob("lib/python3*/site-packages/torch-*+cpu.dist-info"))


def _own_version() -> str:
    try:
        return version("torch")
    except PackageNotFoundError:
        return ""
