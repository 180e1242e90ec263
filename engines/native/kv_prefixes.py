"""Which KV blocks hold which tokens: how a prompt finds the KV cache of others that began as it does.

A full KV block is named by its tokens and by all that came before them, so that equal names mean equal contents. One
that nobody uses any more keeps its name until its place is needed: the one that was not used for longest goes first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

# A collision would give a request the context of another: no hash that anybody could aim at.
_NAME_BYTES = 16


def block_name(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the name of a KV block that holds ``token_ids`` and follows the one named ``before``.

    Args:
        before: Of the first KV block: whatever else its contents depend on, empty for nothing.
    """
    return blake2b(before + array("i", token_ids).tobytes(), digest_size=_NAME_BYTES).digest()


class KvPrefixes:
    """Names of KV blocks, and those of them that nobody uses (``idle``)."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def idle(self) -> tuple[int, ...]:
        """KV blocks that nobody uses, the one that goes first at the front."""
        return tuple(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the KV blocks with these names, up to the first that is not there."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def name(self, block: int, name: bytes) -> None:
        """Say what a KV block holds. Where another holds the same, that one stays the one to be found."""
        if self._block_of.setdefault(name, block) == block:
            self._name_of[block] = name

    def rest(self, block: int) -> bool:
        """Keep a KV block that nobody uses any more; False: nobody could find it."""
        if block not in self._name_of:
            return False
        self._idle[block] = None
        return True

    def wake(self, block: int) -> None:
        """Somebody uses it (again)."""
        self._idle.pop(block, None)

    def evict(self) -> int:
        """Return the idle KV block that was not used for longest, and forget what it holds."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """It does not hold any more what it held."""
        self._idle.pop(block, None)
        name = self._name_of.pop(block, None)
        if name is not None:
            del self._block_of[name]

    def moved(self, source: int, target: int) -> None:
        """What one KV block held is in another now."""
        name = self._name_of.pop(source, None)
        if name is not None:
            self._block_of[name] = target
            self._name_of[target] = name

    def clear(self) -> tuple[int, ...]:
        """Forget everything; return those that were idle."""
        idle = self.idle
        self._block_of.clear()
        self._name_of.clear()
        self._idle.clear()
        return idle
