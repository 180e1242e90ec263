"""What the keeper of parameters says of itself."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFigures:
    """What the cache holds and what came of it. ``refusal``: why the last layer was not kept that was not."""

    budget_bytes: int
    held_bytes: int
    idle_bytes: int
    layers: int
    idle_layers: int
    hits_total: int
    misses_total: int
    given_up_total: int
    refused_total: int
    refusal: str
