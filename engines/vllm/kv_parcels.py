"""The KV caches of single requests on their way out of one vLLM and into another, through shared memory."""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

from engines.errors import EngineError, KvTransferFailed
from engines.offers import KvParcel
from engines.served.channel import Channel
from engines.served.run_directory import list_shared_memory
from engines.vllm.kv_calls import transferred

_SHM: Final = Path("/dev/shm")
_PREFIX: Final = "flexpiped-kv-"
_DEADLINE_S: Final = 30.0  # a step that takes longer holds everything up, not the copy


def _room_bytes() -> int:
    """Return what one request's KV cache may take: shared memory is memory, and half of what is free stays free."""
    free = shutil.disk_usage(_SHM).free
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
    return min(free, available) // 2


class VllmKvParcels:
    """What one vLLM has written or may load.

    Args:
        run_directory: Lists what has to go when the daemon is killed.
        name_of: By which name vLLM's engine core knows a request of ours; None: it has ended.
    """

    def __init__(self, channel: Channel, *, run_directory: Path, name_of: Callable[[str], str | None]) -> None:
        self._channel = channel
        self._run_directory = run_directory
        self._name_of = name_of
        self._numbers = count(1)
        self._directory: Path | None = None  # in shared memory; made when it is first needed

    async def export(self, request_id: str) -> KvParcel:
        """Write a request's KV cache. Raises as ``KvTransfers.export_kv``, but KvTransferFailed for a death, too."""
        name = self._name_of(request_id)
        if name is None:
            raise KvTransferFailed("the request has ended")
        try:
            directory = self._own_directory() / str(next(self._numbers))
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise KvTransferFailed(f"{_SHM} cannot be written: {error.strerror}") from error
        parcel = KvParcel(directory=directory, num_tokens=0, num_bytes=0)
        try:
            written = await self._call("export", name, str(directory), await asyncio.to_thread(_room_bytes))
        except BaseException:
            await self.forget(parcel)
            raise
        return KvParcel(directory=directory, **written)

    async def accept(self, parcel: KvParcel) -> None:
        """Make ready to load a parcel. Raises as ``export``."""
        await self._call("accept", str(parcel.directory), parcel.num_tokens)

    async def forget(self, parcel: KvParcel) -> None:
        """Let go of a parcel, and remove it if it is ours."""
        try:
            await self._call("forget", str(parcel.directory))
        except EngineError:  # it has ended, and has let go of everything
            pass
        finally:
            if parcel.directory.parent == self._directory:
                shutil.rmtree(parcel.directory, ignore_errors=True)

    def _own_directory(self) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHM))
            list_shared_memory(self._run_directory, {self._directory.name})
        return self._directory

    async def _call(self, method: str, *arguments: object) -> Any:
        answer = self._channel.core(f"kv_{method}", *arguments)
        return await transferred(answer, deadline_s=_DEADLINE_S, late="vLLM did not answer")
