"""What some engines offer besides ``engines.protocol.Engine``: each protocol goes with a part of their capabilities."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnServer:
    """An OpenAI server that comes with the engine. What needs more than tokens in and tokens out goes there unchanged.

    The daemon has no copy of such a request's tokens, so it ends where its engine does.
    """

    completion_parameters: frozenset[str]  # all that the server knows by name
    chat_parameters: frozenset[str]
    every_chat: str = ""  # the option that makes every chat its own to render and to read; empty: there is none
    # In bodies for it, of whatever route: there one token id that is not in the vocabulary would end the engine.
    token_id_names: frozenset[str] = frozenset()
    prompt_names: frozenset[str] = frozenset()  # of these, those whose value may be text instead
    # An adapter is named MODEL + this + ADAPTER, and the server takes any other name for the model itself. Empty: it
    # knows the names.
    adapter_mark: str = ""
    tokenizes: bool = True  # /tokenize and /detokenize are taken and answered as vLLM does; else the daemon does so


@runtime_checkable
class OwnRoutes(Protocol):
    """What an engine offers besides when its capabilities say ``own_server``."""

    @property
    def own_routes_socket(self) -> Path:
        """The Unix socket on which the engine's own HTTP server listens. Valid once ``start`` has returned."""

    @property
    def own_routes_key(self) -> str:
        """The bearer token that the server asks for, and only the daemon knows; empty: it asks for none of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvParcel:
    """A request's KV cache, as one engine has it ready for another: in shared memory, or where the engines agree.

    It holds the first ``num_tokens`` tokens of the request, prompt and output. The engine that wrote it owns
    ``directory`` and removes it. ``loan`` is there instead of files where the engines transfer among themselves; what
    it says is theirs, and the request need not name it.
    """

    directory: Path
    num_tokens: int
    num_bytes: int
    loan: Mapping[str, object] | None = None


@runtime_checkable
class KvTransfers(Protocol):
    """What an engine offers besides when its capabilities have a ``kv_form``."""

    async def export_kv(self, request_id: str) -> KvParcel:
        """Write the KV cache of a running request to shared memory: what it has computed by now. The request goes on.

        Raises:
            KvTransferFailed: There is none, or it was lost or did not fit; nothing is left of it.
            EngineDied, EngineClosed
        """

    async def accept_kv(self, parcel: KvParcel) -> None:
        """Make ready to load what an engine of the same ``kv_form`` has written, for a request that comes with it.

        Raises:
            KvTransferFailed: It cannot be loaded here.
            EngineDied, EngineClosed
        """

    async def forget_kv(self, parcel: KvParcel) -> None:
        """Let go of a parcel; who wrote it removes its files. Idempotent, and never an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRange:
    """To how many KV blocks the KV cache can be changed while it serves: the longest sequence always fits."""

    least_blocks: int
    most_blocks: int


@runtime_checkable
class KvResizing(Protocol):
    """What an engine offers besides when its capabilities have a ``kv_range``."""

    async def resize_kv(self, blocks: int) -> int:
        """Have so many KV blocks, while serving: no request fails, at most some are computed again.

        Returns:
            The bytes of memory given back, once they are.

        Raises:
            RefactoringBusy: A refactoring, another change or a recovery is under way.
            RefactoringRefused: It is outside the ``kv_range``.
            EngineDied, EngineClosed
        """


@runtime_checkable
class AdapterChanges(Protocol):
    """What an engine offers besides when its capabilities say ``changes_adapters``."""

    @property
    def adapter_directories(self) -> Mapping[str, str]:
        """The directory of each LoRA adapter, by the name that requests give."""

    @property
    def adapter_bytes(self) -> int:
        """What each device of the engine holds of those that came while it served, wherever layers are."""

    async def load_adapter(self, name: str, directory: str) -> None:
        """Have one more LoRA adapter, while serving: once it returns, ``capabilities.adapters`` has its name.

        Raises:
            AdapterRefused: There is one of that name, or it cannot be read, or is for another model.
            EngineDied, EngineClosed
        """

    async def announce_unload(self, name: str) -> None:
        """Note that a LoRA adapter is to be unloaded once no request is for it. Until then nothing changes.

        If the engine outlives the daemon before that, the next one does not find the adapter.

        Raises:
            AdapterRefused: There is none of that name.
            EngineDied, EngineClosed
        """

    async def unload_adapter(self, name: str) -> None:
        """Take no request for a LoRA adapter any more. Those under way finish with it; then its memory is given back.

        Raises:
            AdapterRefused: There is none of that name.
            EngineDied, EngineClosed
        """
