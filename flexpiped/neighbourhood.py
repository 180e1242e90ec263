"""Watches what others take of the memory that stages share, and has KV caches and layers follow before it runs out.

``planner.neighbourhood`` decides. KV caches are resized by their engines; layers move as with ``flexctl rebalance``. It
works whatever ``[auto]`` says: running out of memory is not a matter of taste.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, assert_never

from engines.errors import EngineError, RefactoringBusy
from engines.offers import KvResizing
from engines.parameters.keeper import ParameterKeeper
from engines.protocol import Engine, StageStatus
from flexpiped import log_events
from flexpiped.device_sharing import Held, devices_beside
from flexpiped.events import EventKind, EventLog
from flexpiped.handover_records import Proposal, Wanted
from flexpiped.kv_of_models import KvOfModels
from flexpiped.memory_pools import pool_names, pools_of, replica_kv
from flexpiped.refactoring import Refactorings
from flexpiped.replica import Replica
from flexpiped.settings import DeviceSettings
from planner.errors import PlannerError
from planner.neighbourhood import (
    Change,
    NeighbourConstants,
    NeighbourState,
    Pool,
    ReplicaKv,
    Verb,
    decide,
    missing_bytes,
)
from topology.device import Device, DeviceKind
from topology.host_memory import FreeMemory, free_host_memory
from topology.units import format_bytes

_PERIOD_S: Final = 2.0  # a look takes a few milliseconds


class LayoutChanged(Exception):
    """Between two questions to an engine: the next look comes soon."""


class Neighbourhood:
    """Used on one event loop.

    Args:
        replicas: Those of now; raises ``EngineError`` before there are any.
        kv_bytes_per_token: Of the model, over all decoders.
        devices: Looks at the devices; may block, and is called in a thread.
        held: What other models of the daemon hold of them.
        on_devices: Told what was seen of the devices, with what other models hold as taken by others.
        parameters: Keeps some in the memory of the host, and gives them up for others.
        host: Looks at the memory of the host; likewise.
        models: The KV caches of all models of the daemon, which share the memory of the host.
    """

    def __init__(
        self,
        constants: NeighbourConstants,
        *,
        replicas: Callable[[], Sequence[Replica]],
        kv_bytes_per_token: Callable[[], int],
        devices: Callable[[], Sequence[Device]],
        refactorings: Refactorings,
        events: EventLog,
        held: Callable[[], Held] = dict,
        on_devices: Callable[[Sequence[Device]], object] = lambda _devices: None,
        parameters: ParameterKeeper | None = None,
        host: Callable[[], FreeMemory | None] = free_host_memory,
        models: KvOfModels | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._constants = constants
        self._replicas = replicas
        self._kv_bytes_per_token = kv_bytes_per_token
        self._devices = devices
        self._held = held
        self._on_devices = on_devices
        self._refactorings = refactorings
        self._events = events
        self._parameters = parameters
        self._host = host
        self._models = models or KvOfModels()
        self._clock = clock
        self._state = NeighbourState()
        self._seen: Sequence[Device] = ()

    async def run_forever(self) -> None:
        """Look again and again."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(_PERIOD_S)
        finally:
            self._models.forget(self)

    async def look(self) -> tuple[Change, ...]:
        """Look at the memory, and carry out what follows; return that."""
        devices, host = await asyncio.to_thread(self._look_around)
        self._on_devices(devices)
        host = await self._with_parameters_given_up((), host)
        names = pool_names(devices, host)
        try:
            serving = [(each, each.engine) for each in self._replicas() if each.engine is not None]
            if await self._has_plenty(serving, devices, host):
                self._state = NeighbourState()
                return ()
            stages = [await engine.stages() for _, engine in serving]
            kvs = [await self._kv(*each, names, seen) for each, seen in zip(serving, stages, strict=True)]
            self._models.saw(self, kvs)
            host = await self._with_parameters_given_up(kvs, host)
        except LayoutChanged:  # while it was asked
            return ()
        except EngineError:
            self._models.forget(self)  # it has no KV cache now
            return ()
        pools = pools_of(devices, [stage for seen in stages for stage in seen], host=host)
        self._state, changes = self._decided(self._state, kvs, pools, host)
        for change in changes:
            await self._carry_out(change, next(each for each, _ in serving if each.number == change.number))
        return changes

    def _look_around(self) -> tuple[Sequence[Device], FreeMemory | None]:
        """Look at the host, and at GPUs: CPU devices are what the configuration says, and stay that."""
        if not self._seen or any(each.kind is not DeviceKind.CPU for each in self._seen):
            self._seen = self._devices()
        return devices_beside(self._seen, self._held()), self._host()

    async def _with_parameters_given_up(self, kvs: Sequence[ReplicaKv], host: FreeMemory | None) -> FreeMemory | None:
        """Give up idle parameters of what is missing on the host, before any KV cache; return what is free then."""
        if self._parameters is None or host is None or not self._parameters.kept.idle_bytes:
            return host
        pool = Pool(name=host.bound, free_bytes=host.free_bytes)
        missing = missing_bytes((*kvs, *self._beside(host)), pool, self._constants)
        if not missing:
            return host
        given_up = await self._parameters.give_up(missing)
        said = f"parameters of {format_bytes(given_up)} leave the memory of the host: {format_bytes(missing)} are short"
        self._events.publish(EventKind.DEVICES, said, change="parameters", bytes=given_up)
        return await asyncio.to_thread(self._host)

    async def _has_plenty(
        self, serving: Sequence[tuple[Replica, Engine]], devices: Sequence[Device], host: FreeMemory | None
    ) -> bool:
        """Whether all KV caches fit even if nothing of them is mapped yet: to ask what is mapped costs stages time."""
        if any(each.kind is not DeviceKind.CPU for each in devices):
            return False
        names = pool_names(devices, host)
        kvs = [await self._kv(*each, names, None) for each in serving]
        self._models.saw(self, kvs)
        _, changes = self._decided(NeighbourState(), kvs, pools_of(devices, (), host=host), host)
        return not changes and all(kv.blocks == kv.most_blocks for kv in kvs)

    def _decided(
        self, state: NeighbourState, kvs: Sequence[ReplicaKv], pools: Sequence[Pool], host: FreeMemory | None
    ) -> tuple[NeighbourState, tuple[Change, ...]]:
        constants, beside = self._constants, self._beside(host)
        return decide(state, kvs, pools, now_s=self._clock(), constants=constants, beside=beside)

    def _beside(self, host: FreeMemory | None) -> tuple[ReplicaKv, ...]:
        """Return the KV caches of other models on the host. On GPUs what they hold is seen with the devices."""
        return () if host is None else self._models.beside(self, pool=host.bound)

    async def _kv(
        self, replica: Replica, engine: Engine, names: Mapping[str, str], seen: Sequence[StageStatus] | None
    ) -> ReplicaKv:
        """Return the KV cache of a replica; ``seen`` None: as if nothing of it were mapped."""
        pipeline, counters = engine.pipeline, await engine.counters()
        if seen is not None and len(seen) != pipeline.granularity:
            raise LayoutChanged
        return replica_kv(
            replica.number,
            counters,
            pipeline,
            mapped_bytes=[0] * pipeline.granularity if seen is None else [stage.kv_mapped_bytes for stage in seen],
            kv_range=engine.capabilities.kv_range,
            kv_bytes_per_token=self._kv_bytes_per_token(),
            pool_of=names,
        )

    async def _carry_out(self, change: Change, replica: Replica) -> None:
        engine = replica.engine
        if engine is None:
            return
        try:
            match change.verb:
                case Verb.SHRINK | Verb.GROW:
                    await self._resize(change, replica, engine)
                case Verb.MOVE:
                    await self._move(change, engine)
                case Verb.SHORT:
                    log_events.memory_short(replica=change.number, reason=change.reason)
                    self._tell(change, f"replica {change.number}: {change.reason}")
                case _:
                    assert_never(change.verb)
        except RefactoringBusy:  # the next look comes soon
            if change.verb is Verb.MOVE:
                self._state = self._state.without_move(change.number)
        except (EngineError, PlannerError) as error:
            self._tell(change, f"replica {change.number}: not done: {error}")

    async def _move(self, change: Change, engine: Engine) -> None:
        """Ask for a layout of as many stages: the planner sees what is free on each device now."""
        if self._refactorings.under_way is None:  # else it is told when it begins
            self._tell(change, f"replica {change.number}: {change.reason}")
        started = await self._refactorings.start(Wanted(stages=engine.pipeline.granularity, on=change.number))
        if isinstance(started, Proposal):
            self._tell(change, f"replica {change.number}: not done: {'; '.join(started.check.sentences)}")

    async def _resize(self, change: Change, replica: Replica, engine: Engine) -> None:
        assert isinstance(engine, KvResizing), "as its kv_range says"
        before = (await engine.counters()).kv_blocks_capacity
        await engine.resize_kv(change.blocks)
        after = await engine.counters()
        replica.facts.kv_capacity_tokens = after.kv_blocks_capacity * after.kv_block_tokens
        log_events.kv_resized(replica=change.number, before=before, after=change.blocks, reason=change.reason)
        said = f"replica {change.number}: KV cache {change.verb.value}s from {before} to {change.blocks} KV blocks"
        self._tell(change, f"{said}: {change.reason}")

    def _tell(self, change: Change, message: str) -> None:
        fields = {"change": change.verb.value, "replica": change.number, "kv_blocks": change.blocks}
        self._events.publish(EventKind.DEVICES, message, **fields)


def constants_of(settings: DeviceSettings) -> NeighbourConstants:
    """Return the constants that are configured."""
    return NeighbourConstants(**{name: getattr(settings, name) for name in NeighbourConstants.__dataclass_fields__})
