"""The KV caches of all models of a daemon, as last seen: what one of them may yet take is not free for the others."""

from collections.abc import Sequence
from dataclasses import replace

from planner.neighbourhood import ReplicaKv


class KvOfModels:
    """Written by each model's neighbourhood, and read by those of the others."""

    def __init__(self) -> None:
        self._seen: dict[object, Sequence[ReplicaKv]] = {}

    def saw(self, who: object, kvs: Sequence[ReplicaKv]) -> None:
        """Note the KV caches of one model's replicas."""
        self._seen[who] = kvs

    def forget(self, who: object) -> None:
        """A model serves no more."""
        self._seen.pop(who, None)

    def beside(self, who: object, *, pool: str) -> tuple[ReplicaKv, ...]:
        """Return those of all other models, with what they have of one pool."""
        others = (kv for each, kvs in self._seen.items() if each is not who for kv in kvs)
        shares = ((kv, tuple(share for share in kv.shares if share.pool == pool)) for kv in others)
        return tuple(replace(kv, shares=there) for kv, there in shares if there)
