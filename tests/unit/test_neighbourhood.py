"""The KV caches of fake engines, and their layers, follow the memory that others leave."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from engines.errors import RefactoringBusy
from engines.fake import FAKE_CAPABILITIES, FakeEngine
from engines.parameters.keeper import ParameterKeeper
from flexpiped.events import EventKind
from flexpiped.handover_records import Wanted
from flexpiped.kv_of_models import KvOfModels
from flexpiped.memory_pools import pool_names, pools_of, replica_kv
from flexpiped.neighbourhood import Neighbourhood
from flexpiped.refactoring import Started
from planner.layout import Pipeline
from planner.neighbourhood import NeighbourConstants, Pool, Verb
from planner.parameter_cache import KeptLayer, KeptLayers
from tests.support.layouts import NUM_DECODERS, EvenResolver, even_pipeline
from tests.support.until import until
from tests.unit.test_scaling import ScaleStand
from topology.device import Device, DeviceKind, cpu_devices
from topology.host_memory import FreeMemory
from topology.units import KIB, MIB

KV_BYTES_PER_TOKEN = 64 * KIB  # 1 MiB for each of the 4096 KV blocks of a fake engine, of which 33 are the least
CONSTANTS = NeighbourConstants(keep_free_bytes=100 * MIB, grow_after_s=30.0)


class MemoryStand(ScaleStand):
    """Replicas on CPU devices of a host with ``free`` bytes, or on GPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.free = 10_000 * MIB
        self.now_s = 0.0
        self.devices: tuple[Device, ...] = cpu_devices(count=8, memory_bytes=512 * MIB)
        self.held: dict[str, int] = {}  # by other models
        self.seen: list[Sequence[Device]] = []
        self.neighbourhood = self.watching()

    def watching(self, *, parameters: ParameterKeeper | None = None, models: KvOfModels | None = None) -> Neighbourhood:
        """Return what watches this memory, with parameters to give up or without, alone or beside other models."""
        return Neighbourhood(
            CONSTANTS,
            replicas=lambda: self.replicas.all,
            kv_bytes_per_token=lambda: KV_BYTES_PER_TOKEN,
            devices=lambda: self.devices,
            held=lambda: self.held,
            on_devices=self.seen.append,
            refactorings=self.refactorings,
            events=self.events,
            parameters=parameters,
            host=lambda: FreeMemory(free_bytes=self.free, bound="the host"),
            models=models,
            clock=lambda: self.now_s,
        )

    async def kv_blocks(self) -> list[int]:
        return [(await engine.counters()).kv_blocks_capacity for engine in self.replicas.engines]


@pytest.fixture
async def stand() -> AsyncIterator[MemoryStand]:
    stand = MemoryStand()
    await stand.add(even_pipeline(2))
    yield stand
    await stand.refactorings.close()
    await stand.replicas.close()


async def test_the_kv_cache_shrinks_when_others_take_memory_and_grows_when_they_free_it(stand: MemoryStand) -> None:
    assert await stand.neighbourhood.look() == ()
    stand.free = 1100 * MIB
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [900]
    assert stand.replicas.main.facts.kv_capacity_tokens == 900 * 16  # routing goes by it
    assert stand.events.since(0)[-1].message == (
        "replica 1: KV cache shrinks from 4096 to 900 KV blocks: "
        "1.1 GiB are free on the host, where 100 MiB are to stay free, for 1000 KV blocks"
    )
    stand.free = 10_000 * MIB
    for _ in range(2):
        await stand.neighbourhood.look()
        stand.now_s += 30.0
    assert await stand.kv_blocks() == [4096]
    assert stand.events.since(0)[-1].fields == {"change": "grow", "replica": 1, "kv_blocks": 4096}


async def test_all_replicas_give_way_and_one_that_comes_later_too(stand: MemoryStand) -> None:
    await stand.scaled(Wanted(replicas=2, stages=1))
    stand.free = 2100 * MIB
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [900, 900]
    await stand.scaled(Wanted(replicas=3, stages=1))
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [600, 600, 600]


async def test_models_on_one_host_give_way_in_proportion_until_one_of_them_ends(stand: MemoryStand) -> None:
    """What the KV cache of one may yet take, another one must not count on."""
    models, other = KvOfModels(), MemoryStand()
    await other.add(even_pipeline(2))
    stand.free = other.free = 4300 * MIB  # enough for each of them alone
    first, second = stand.watching(models=models), other.watching(models=models)
    for _ in range(2):
        await first.look()
        await second.look()
    assert [await each.kv_blocks() for each in (stand, other)] == [[1890], [1890]]
    watching = asyncio.create_task(second.run_forever())
    await other.refactorings.close()
    await other.replicas.close()
    watching.cancel()
    await asyncio.wait([watching])
    for stand.now_s in (0.0, 30.0):
        await first.look()
    assert await stand.kv_blocks() == [4096]


async def test_while_a_refactoring_is_under_way_it_waits_for_the_next_look(stand: MemoryStand) -> None:
    stand.engine(0).hold_refactoring()
    started = await stand.refactorings.start(Wanted(stages=4))
    assert isinstance(started, Started)
    await until(lambda: "in phase prepare" in (stand.refactorings.under_way or ""))
    stand.free = 1100 * MIB
    with pytest.raises(RefactoringBusy):
        await stand.engine(0).resize_kv(100)
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [4096]
    stand.engine(0).release_refactoring()
    await stand.refactorings.ended(started)
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [900]


async def test_an_engine_that_ends_or_is_not_there_disturbs_nothing(stand: MemoryStand) -> None:
    stand.free = 1100 * MIB
    stand.engine(0).kill("killed by a test")
    assert await stand.neighbourhood.look() == ()
    await stand.replicas.ready_engine()
    await stand.neighbourhood.look()
    assert await stand.kv_blocks() == [900]  # the new one, too


def gpu(name: str, *, others: int = 0) -> Device:
    return Device(
        id=name,
        kind=DeviceKind.CUDA,
        memory_total_bytes=10_000 * MIB,
        memory_reserved_bytes=others,
        memory_others_bytes=others,
    )


class AvoidingResolver(EvenResolver):
    """Sees that a device is full."""

    def beside(self, wanted: Wanted, *, taken: frozenset[str], num_decoders: int = NUM_DECODERS) -> Pipeline:
        return super().beside(wanted, taken=taken | {"cpu:0"}, num_decoders=num_decoders)


async def has_fixed_kv(stand: MemoryStand) -> None:
    """Have one replica, number 2, of an engine that cannot change its KV cache."""
    fixed, first = replace(FAKE_CAPABILITIES, kv_range=None), stand.replicas.main
    await stand.replicas.add(
        even_pipeline(2),
        factory=lambda pipeline, epoch: FakeEngine(pipeline=pipeline, epoch=epoch, capabilities=fixed),
    )
    await stand.replicas.remove(first, drain_deadline_s=1.0)


async def test_layers_move_where_the_kv_cache_cannot_shrink_and_another_gpu_has_room(stand: MemoryStand) -> None:
    await has_fixed_kv(stand)
    stand.devices = (gpu("cpu:0", others=9_950 * MIB), gpu("cpu:1"), gpu("cpu:2"))
    stand.resolver = AvoidingResolver()
    found = []
    for _ in range(8):
        found += await stand.neighbourhood.look()
        stand.now_s += 2.0
    assert [change.verb for change in found] == [Verb.MOVE]
    assert stand.events.since(0)[0].message.startswith("replica 2: 46 MiB are free on cpu:0, where 100 MiB are to stay")
    await until(lambda: stand.layouts == {2: ("cpu:1", "cpu:2")})


async def test_a_move_that_could_not_begin_is_asked_for_again_at_the_next_look_and_told_when_it_begins(
    stand: MemoryStand,
) -> None:
    await has_fixed_kv(stand)
    stand.devices = (gpu("cpu:0", others=9_950 * MIB), gpu("cpu:1"), gpu("cpu:2"))
    stand.resolver = AvoidingResolver()
    await stand.neighbourhood.look()
    stand.now_s += 10.0
    [engine] = stand.replicas.engines
    assert isinstance(engine, FakeEngine)
    engine.hold_refactoring()
    started = await stand.refactorings.start(Wanted(layout="1"))
    assert isinstance(started, Started)
    before = stand.events.last_sequence
    for _ in range(2):
        assert [change.verb for change in await stand.neighbourhood.look()] == [Verb.MOVE]
        assert [event for event in stand.events.since(before) if event.kind is EventKind.DEVICES] == []
        stand.now_s += 2.0
    await stand.refactorings.cancel()
    engine.release_refactoring()
    await stand.refactorings.ended(started)
    assert [change.verb for change in await stand.neighbourhood.look()] == [Verb.MOVE]
    await until(lambda: stand.layouts == {2: ("cpu:1", "cpu:2")})


async def test_that_nothing_can_be_done_is_told_once_with_the_numbers(stand: MemoryStand) -> None:
    """On the host, where the KV cache has shrunk as far as it goes, and there is nowhere else."""
    stand.free = 50 * MIB
    with capture_logs() as logs:
        for _ in range(20):
            await stand.neighbourhood.look()
            stand.now_s += 2.0
    assert [event.fields["change"] for event in stand.events.since(0)] == ["shrink", "short"]
    why = (
        "50 MiB are free on the host, where 100 MiB are to stay free, and the KV cache cannot shrink further: layers "
        "cannot move, as there is no other device"
    )
    assert stand.events.since(0)[-1].message == f"replica 1: {why}"
    [told] = [each for each in logs if each["log_level"] == "warning"]
    assert told == {"event": "memory is short", "log_level": "warning", "replica": 1, "reason": why}


async def test_where_no_other_layout_is_better_that_is_told(stand: MemoryStand) -> None:
    await has_fixed_kv(stand)
    stand.devices = (gpu("cpu:0", others=9_950 * MIB), gpu("cpu:1"))
    for _ in range(8):
        await stand.neighbourhood.look()
        stand.now_s += 2.0
    _, not_done = (event.message for event in stand.events.since(0))
    assert not_done == "replica 2: not done: this layout is in force already"


async def test_what_is_seen_of_the_devices_is_told_with_what_other_models_hold_then(stand: MemoryStand) -> None:
    await stand.neighbourhood.look()
    stand.held = {"cpu:1": 5 * MIB}  # a model has started since
    await stand.neighbourhood.look()
    assert [[each.memory_others_bytes for each in devices[:3]] for devices in stand.seen] == [
        [0, 0, 0],
        [0, 5 * MIB, 0],
    ]


def test_gpus_have_memory_of_their_own_less_what_we_hold_and_cpu_devices_that_of_the_host() -> None:
    host = FreeMemory(free_bytes=MIB, bound="the host")
    cpu = cpu_devices(count=2, memory_bytes=MIB)
    assert pool_names((*cpu, gpu("GPU-1")), host) == {"cpu:0": "the host", "cpu:1": "the host", "GPU-1": "GPU-1"}
    assert pools_of(cpu, (), host=host) == (Pool(name="the host", free_bytes=MIB, is_host=True),)
    assert pools_of(cpu, (), host=None) == (Pool(name="the host", free_bytes=None, is_host=True),)
    assert pools_of((gpu("GPU-1", others=MIB),), (), host=host) == (
        Pool(name="GPU-1", free_bytes=9_999 * MIB, is_shared=True),
    )


async def test_each_stage_has_its_share_of_a_kv_block(stand: MemoryStand) -> None:
    counters = await stand.engine(0).counters()
    kv = replica_kv(
        1,
        counters,
        even_pipeline(4),
        mapped_bytes=[1, 2, 3, 4],
        kv_range=stand.engine(0).capabilities.kv_range,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        pool_of={"cpu:0": "a", "cpu:1": "a", "cpu:2": "b", "cpu:3": "b"},
    )
    assert [(share.pool, share.block_bytes, share.mapped_bytes) for share in kv.shares] == [
        ("a", MIB / 2, 3),
        ("b", MIB / 2, 7),
    ]


async def test_parameters_without_a_stage_go_before_any_kv_cache_shrinks(stand: MemoryStand) -> None:
    kept = [KeptLayer(key=name, name=name, num_bytes=300 * MIB) for name in "abc"]
    keeper = PretendedKeeper(kept, on_give_up=lambda num_bytes: setattr(stand, "free", stand.free + num_bytes))
    stand.neighbourhood = stand.watching(parameters=keeper)
    stand.free = 3800 * MIB  # 4196 are wanted
    assert await stand.neighbourhood.look() == ()
    assert [each.name for each in keeper.kept.layers] == ["c"]
    assert stand.events.since(0)[-1].message == "parameters of 600 MiB leave the memory of the host: 396 MiB are short"
    stand.free = 3800 * MIB
    [change] = await stand.neighbourhood.look()  # the last 300 MiB are not enough
    assert (change.verb, keeper.kept.layers) == (Verb.SHRINK, ())


async def test_they_go_when_nothing_serves_too(stand: MemoryStand) -> None:
    kept = [KeptLayer(key=name, name=name, num_bytes=30 * MIB) for name in "ab"]
    keeper = PretendedKeeper(kept, on_give_up=lambda num_bytes: setattr(stand, "free", stand.free + num_bytes))
    alone = Neighbourhood(
        CONSTANTS,
        replicas=lambda: (),
        kv_bytes_per_token=lambda: KV_BYTES_PER_TOKEN,
        devices=lambda: stand.devices,
        refactorings=stand.refactorings,
        events=stand.events,
        parameters=keeper,
        host=lambda: FreeMemory(free_bytes=stand.free, bound="the host"),
    )
    stand.free = 80 * MIB
    assert await alone.look() == ()
    assert [each.name for each in keeper.kept.layers] == ["b"]


class PretendedKeeper(ParameterKeeper):
    """Keeps layers that have no memory."""

    def __init__(self, layers: Sequence[KeptLayer], *, on_give_up: Callable[[int], object]) -> None:
        super().__init__(1000 * MIB)
        self._kept = KeptLayers(layers=tuple(layers))
        self._memory = {each.key: NoMemory() for each in layers}
        self._on_give_up = on_give_up

    async def give_up(self, num_bytes: int) -> int:
        given_up = await super().give_up(num_bytes)
        self._on_give_up(given_up)
        return given_up


class NoMemory:
    def close(self) -> None:
        pass
