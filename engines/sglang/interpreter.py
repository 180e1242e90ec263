"""Which SGLang an interpreter has."""

from pathlib import Path
from typing import Final

from engines.served.interpreter import DEADLINE_S, Wanted, engine_version

SGLANG: Final = Wanted(name="SGLang", package="sglang", oldest=(0, 5, 23))


async def sglang_version(python: str, *, deadline_s: float = DEADLINE_S) -> str:
    """Return the version of the SGLang that ``python`` would import. Raises as ``engine_version``."""
    return await engine_version(SGLANG, python, deadline_s=deadline_s)


def has_cpu_torch(python: Path) -> bool:
    """Return whether the torch of an interpreter is built for the CPU, by the version under which it is installed."""
    return any(python.parent.parent.glob("lib/python3*/site-packages/torch-*+cpu.dist-info"))
