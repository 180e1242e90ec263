"""Counters of several engines as one."""

from collections.abc import Sequence
from dataclasses import replace

from engines.protocol import Engine, EngineCounters


async def total_counters(engines: Sequence[Engine]) -> EngineCounters | None:
    """Return what they count together; None of none. KV blocks are of the size that the first one has.

    Raises:
        EngineError: One of them is gone.
    """
    found = [await engine.counters() for engine in engines]
    if not found:
        return None
    names = [name for name in EngineCounters.__dataclass_fields__ if name != "kv_block_tokens"]
    return replace(found[0], **{name: sum(getattr(each, name) for each in found) for name in names})
