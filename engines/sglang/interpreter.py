"""Which SGLang an interpreter has."""

from typing import Final

from engines.served.interpreter import DEADLINE_S, Wanted, engine_version

SGLANG: Final = Wanted(name="SGLang", package="sglang", oldest=(0, 5, 23))


async def sglang_version(python: str, *, deadline_s: float = DEADLINE_S) -> str:
    """Return the version of the SGLang that ``python`` would import. Raises as ``engine_version``."""
    return await engine_version(SGLANG, python, deadline_s=deadline_s)
