"""The KV caches of single requests on their way from one vLLM to another by NIXL: vLLM's connectors transfer them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from engines.errors import KvTransferFailed
from engines.offers import KvParcel
from engines.served.channel import Channel
from engines.vllm.kv_calls import transferred

_DEADLINE_S: Final = 60.0  # the first transfer between two vLLMs waits until NIXL has connected them


class VllmKvLoans:
    """What one vLLM lends to others, and borrows from them.

    Args:
        name_of: By which name vLLM's engine core knows a request of ours; None: it has ended.
    """

    def __init__(self, channel: Channel, *, name_of: Callable[[str], str | None]) -> None:
        self._channel = channel
        self._name_of = name_of

    async def export(self, request_id: str) -> KvParcel:
        """Lend a request's KV cache. Raises as ``KvTransfers.export_kv``, but KvTransferFailed for a death, too."""
        name = self._name_of(request_id)
        if name is None:
            raise KvTransferFailed("the request has ended")
        lent = await self._call("kv_lend", name=name)
        tokens = lent["tokens"]
        return KvParcel(
            directory=Path(name),  # nothing lies there: it only tells this parcel from others
            num_tokens=len(tokens),
            num_bytes=lent["num_bytes"],
            loan={"tokens": tokens, "params": lent["params"]},
        )

    async def accept(self, parcel: KvParcel) -> None:
        """Read what another vLLM lends. Raises as ``export``."""
        if parcel.loan is None:
            raise KvTransferFailed("it lies in files, and this vLLM transfers by NIXL")
        await self._call("kv_borrow", **parcel.loan)

    async def forget(self, parcel: KvParcel) -> None:
        """Nothing has to be done: vLLM lets go of what has been read, and of the rest when its lease has run out."""

    async def _call(self, op: str, **fields: Any) -> Any:
        answer = self._channel.call(op, **fields)
        return await transferred(answer, deadline_s=_DEADLINE_S, late="NIXL did not transfer it")
