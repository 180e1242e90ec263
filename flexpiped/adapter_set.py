"""The LoRA adapters that a model serves, as configured and as changed since, in every engine that comes.

    load: every engine reads it -> requests may name it
    unload: no request may name it -> those under way end with it -> every engine lets go of it

An engine is brought into line after it has started and before it serves: one that takes a dead one's place, a second
instance, a replica more. An engine that outlived the daemon is believed what it has. A change that has begun is carried
out to its end, also when who asked for it has left meanwhile: else engines would have what nobody here knows of.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from engines.errors import AdapterRefused, EngineClosed, EngineDied, EngineStartFailed, UnsupportedByEngine
from engines.offers import AdapterChanges
from engines.protocol import Engine
from flexpiped.replicas import Replicas

T = TypeVar("T")
_GONE = (EngineDied, EngineClosed)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """``requests`` are under way with it; ``is_leaving``: no other may come."""

    name: str
    directory: str
    requests: int
    is_leaving: bool


class AdapterSet:
    """Those of one model. Used on one event loop.

    Args:
        replicas: What serves the model.
        is_taken: Whether requests that give a name mean something else than an adapter of this model.
        tell: Told what comes and goes, and of one that an engine could not load again.
    """

    def __init__(
        self,
        *,
        replicas: Callable[[], Replicas],
        is_taken: Callable[[str], bool],
        tell: Callable[[str], object] = lambda _news: None,
    ) -> None:
        self._replicas = replicas
        self._is_taken = is_taken
        self._tell = tell
        self._wanted: dict[str, str] | None = None  # directories by name; None before the first engine
        self._leaving: dict[str, str] = {}
        self._engines: set[AdapterChanges] = set()
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._under_way: set[asyncio.Task[Any]] = set()

    @property
    def leaving(self) -> frozenset[str]:
        """Those that engines still have, and no request may name any more."""
        return frozenset(self._leaving)

    @property
    def device_bytes(self) -> int:
        """What each device holds of those that came while engines served. May be asked for in any thread."""
        return sum(engine.adapter_bytes for engine in tuple(self._engines))

    def all(self) -> tuple[ServedAdapter, ...]:
        """Return those that engines have. Raises ``UnsupportedByEngine``, ``EngineDied``: there is no engine yet."""
        self._ensure_can_change()
        flights = self._replicas().flights
        known = [(self._wanted or {}, False), (self._leaving, True)]
        return tuple(
            ServedAdapter(name=name, directory=where, requests=flights.with_adapter(name), is_leaving=is_leaving)
            for directories, is_leaving in known
            for name, where in directories.items()
        )

    async def load(self, name: str, directory: str) -> None:
        """Have one more; return when requests may name it.

        Raises:
            AdapterRefused: Requests that give this name mean something else, or it cannot be read.
            UnsupportedByEngine: The engine does not change its adapters while it serves.
            EngineDied, EngineClosed: None serves.
        """
        await self._replicas().ready_engine()
        await self._to_its_end(self._load(name, directory))

    async def unload(self, name: str) -> int:
        """Have no request name it any more; return how many go on with it until they end.

        Raises:
            AdapterRefused: There is none of that name.
            UnsupportedByEngine: The engine does not change its adapters while it serves.
            EngineDied, EngineClosed: None serves.
        """
        await self._replicas().ready_engine()
        return await self._to_its_end(self._unload(name))

    async def bring_into_line(self, engine: Engine, *, must: bool) -> None:
        """Have an engine that has just started serve the same adapters as the others.

        Args:
            must: It may not serve without one of them; else one that cannot be had is lost, and told of.

        Raises:
            EngineStartFailed: It cannot have one of them, and must.
            EngineDied, EngineClosed: It has ended meanwhile.
        """
        if not (engine.capabilities.changes_adapters and isinstance(engine, AdapterChanges)):
            return
        async with self._changing:
            if self._wanted is None:
                self._wanted = dict(engine.adapter_directories)
            wanted = self._wanted | self._leaving
            for name in [each for each, where in engine.adapter_directories.items() if wanted.get(each) != where]:
                await engine.unload_adapter(name)
            for name, directory in wanted.items():
                if name not in engine.adapter_directories:
                    await self._load_again(engine, name, directory, must=must)
                if name in self._leaving and name in engine.adapter_directories:
                    await engine.announce_unload(name)
            self._engines.add(engine)

    async def close(self) -> None:
        """Wait for nothing any more. Idempotent."""
        for task in self._ending:
            task.cancel()
        if self._ending:
            await asyncio.wait(self._ending)

    # --- inside ---

    async def _to_its_end(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change, name="adapter-change")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def _load(self, name: str, directory: str) -> None:
        async with self._changing:
            self._ensure_can_change()
            self._ensure_free(name)
            await self._load_in_all(name, directory)
            self._known()[name] = directory
        self._tell(f"adapter {name!r} loaded from {directory}")

    async def _unload(self, name: str) -> int:
        async with self._changing:
            self._ensure_can_change()
            if name not in self._known():
                raise AdapterRefused(f"adapter {name!r} is not loaded")
            self._leaving[name] = self._known().pop(name)
        requests = self._replicas().flights.with_adapter(name)
        left = f"; {requests} requests go on with it" if requests else ""
        self._tell(f"adapter {name!r} unloaded{left}")
        if not requests:
            await self._let_go(name)
        else:
            ending = asyncio.create_task(self._let_go(name), name=f"adapter-{name}-leaves")
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await self._announce_in_all(name)
        return requests

    def _known(self) -> dict[str, str]:
        assert self._wanted is not None, "an engine that changes adapters was brought into line"
        return self._wanted

    def _ensure_can_change(self) -> None:
        capabilities = self._replicas().capabilities
        if capabilities is None:
            raise EngineDied("the engine is starting")
        if not capabilities.changes_adapters:
            raise UnsupportedByEngine(f"the {capabilities.name} engine does not change its adapters while it serves")

    def _ensure_free(self, name: str) -> None:
        if not name.isprintable():  # it is shown on terminals
            raise AdapterRefused(f"{name!r} has characters that cannot be shown")
        if name in self._known():
            raise AdapterRefused(f"adapter {name!r} is loaded already")
        if name in self._leaving:
            requests = self._replicas().flights.with_adapter(name)
            raise AdapterRefused(f"adapter {name!r} was unloaded, and {requests} requests still go on with it")
        if self._is_taken(name):
            raise AdapterRefused(f"{name!r} is the name of a model, or of another model's adapter")

    async def _load_in_all(self, name: str, directory: str) -> None:
        """Have all engines load it, or none."""
        done: list[AdapterChanges] = []
        for engine in tuple(self._engines):
            try:
                await engine.load_adapter(name, directory)
                done.append(engine)
            except _GONE:
                self._engines.discard(engine)
            except AdapterRefused:
                for each in done:
                    with suppress(*_GONE):
                        await each.unload_adapter(name)
                raise
        if not done:
            raise EngineDied("the engine died over it")

    async def _load_again(self, engine: AdapterChanges, name: str, directory: str, *, must: bool) -> None:
        try:
            await engine.load_adapter(name, directory)
        except AdapterRefused as refusal:
            if must:
                raise EngineStartFailed(str(refusal)) from refusal
            self._known().pop(name, None)
            self._leaving.pop(name, None)
            await self._unload_in_all(name)
            self._tell(f"lost: {refusal}")

    async def _let_go(self, name: str) -> None:
        await self._replicas().flights.without_adapter(name)
        async with self._changing:
            if self._leaving.pop(name, None) is not None:
                await self._unload_in_all(name)

    async def _announce_in_all(self, name: str) -> None:
        """Have an engine that outlives the daemon know that it is not to serve this one any more."""
        async with self._changing:
            for engine in tuple(self._engines) if name in self._leaving else ():
                with suppress(AdapterRefused, *_GONE):
                    await engine.announce_unload(name)

    async def _unload_in_all(self, name: str) -> None:
        for engine in tuple(self._engines):
            try:
                await engine.unload_adapter(name)
            except _GONE:
                self._engines.discard(engine)
            except AdapterRefused:
                pass  # it had not got it
