"""The fake engine's LoRA adapters: names and directories, and nothing is read."""

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Final

from engines.errors import AdapterRefused

_ADAPTER_BYTES: Final = 1 << 10


class FakeAdapters:
    """Those of one fake engine. A directory whose name begins with "broken" has none.

    Args:
        names: Of those that are there from the start. They take nothing of a device; one that comes does.
        on_change: Told the names whenever they have changed.
    """

    def __init__(self, names: tuple[str, ...], *, on_change: Callable[[tuple[str, ...]], None]) -> None:
        self._directories = dict.fromkeys(names, "")
        self._on_change = on_change
        self.announced: set[str] = set()  # those that are to be unloaded

    @property
    def directories(self) -> Mapping[str, str]:
        """The directory of each, by its name."""
        return self._directories

    @property
    def device_bytes(self) -> int:
        """What they take of each device."""
        return sum(_ADAPTER_BYTES for directory in self._directories.values() if directory)

    def load(self, name: str, directory: str) -> None:
        """Have one more. Raises: AdapterRefused."""
        if name in self._directories:
            raise AdapterRefused(f"adapter {name!r} is loaded already")
        if PurePath(directory).name.startswith("broken"):
            raise AdapterRefused(f"adapter {name!r} in {directory}: there is none")
        self._have(self._directories | {name: directory})

    def announce(self, name: str) -> None:
        """Note that one is to go. Raises: AdapterRefused."""
        self._ensure_loaded(name)
        self.announced.add(name)

    def unload(self, name: str) -> None:
        """Have it no more. Raises: AdapterRefused."""
        self._ensure_loaded(name)
        self._have({known: where for known, where in self._directories.items() if known != name})

    def _ensure_loaded(self, name: str) -> None:
        if name not in self._directories:
            raise AdapterRefused(f"adapter {name!r} is not loaded")

    def _have(self, directories: dict[str, str]) -> None:
        self._directories = directories
        self._on_change(tuple(directories))
