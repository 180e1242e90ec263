"""Counters of several engines as one."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from engines.protocol import Engine, EngineCounters


async def total_counters(engines: Sequence[Engine]) -> EngineCounters | None:
    """Return what they count together; None of none. KV blocks are of the size that the first one has.

    What only some of them tell is the sum over those.

    Raises:
        EngineError: One of them is gone.
    """
    found = [await engine.counters() for engine in engines]
    if not found:
        return None
    names = [name for name in EngineCounters.__dataclass_fields__ if name != "kv_block_tokens"]
    sums: dict[str, Any] = {name: _sum_of(getattr(each, name) for each in found) for name in names}
    return replace(found[0], **sums)


def _sum_of(told: Iterable[int | None]) -> int | None:
    known = [each for each in told if each is not None]
    return sum(known) if known else None
