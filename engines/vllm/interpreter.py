"""Which vLLM an interpreter has."""

from pathlib import Path
from typing import Final

from engines.served.interpreter import DEADLINE_S, Wanted, engine_version

# The first with endpoint plugins, which carry requests and tokens.
VLLM: Final = Wanted(name="vLLM", package="vllm", oldest=(0, 32))


async def vllm_version(python: str, *, deadline_s: float = DEADLINE_S) -> str:
    """Return the version of the vLLM that ``python`` would import. Raises as ``engine_version``."""
    return await engine_version(VLLM, python, deadline_s=deadline_s)


def is_cpu_build(python: Path) -> bool:
    """Return whether the vLLM of an interpreter is built for the CPU, by the name under which it is installed."""
    return any(python.parent.parent.glob("lib/python3*/site-packages/vllm*cpu*.dist-info"))
