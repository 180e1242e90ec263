"""Whole simulations: no request is lost, and memory that neighbours take is given up in time."""

from dataclasses import dataclass, field, replace

import pytest

from planner.layer_costs import decode_batch, prefill_batch
from planner.load import Observation
from planner.policy_state import PolicyConstants
from planner.prediction import Pipeline
from planner.request_figures import RequestTimes
from planner.routing import Job, Jobs, Option, choose_replica
from planner.simulation import opt_66b
from planner.simulation.baselines import BestStatic, FastColdStart, Oracle, Static
from planner.simulation.clock import Clock
from planner.simulation.cluster import hosts_of, mostly_free, occupied_devices
from planner.simulation.fleet import Fleet
from planner.simulation.members import FleetEvents
from planner.simulation.outcome import Outcome, stall_lengths
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.pool import DevicePool, Placed, Placing, PoolDevice
from planner.simulation.replica import SimulatedRequest
from planner.simulation.run import MemoryChange, Setting, simulate
from planner.simulation.system import System
from planner.simulation.variants import multiplexed, sharing_tensors
from planner.traces import drawn_trace
from planner.workload import Slo, Workload

SLO = Slo(ttft_s=5.0, tpot_s=0.4)
CALM = Workload(rate_per_s=4.0, prompt_tokens_mean=512, output_tokens_mean=64)
TRACE = drawn_trace(CALM, duration_s=200.0, seed=1)
SHAPES = opt_66b.shapes()
SETTING = Setting(trace=TRACE, shapes=SHAPES, slo=SLO, expected=CALM)


def pool(devices: int = 32, occupancy: float = 0.0) -> DevicePool:
    hosts = hosts_of(devices=devices, hosts=devices // 2)
    return DevicePool(
        devices=occupied_devices(
            hosts, total_bytes=opt_66b.DEVICE_BYTES, shares=(0.1, 0.3, 0.6), occupancy=occupancy, seed=1
        )
    )


def own(**constants: float) -> Flexpiped:
    known = PolicyConstants(min_replicas=1, max_replicas=8)
    return Flexpiped(constants=replace(known, **constants), outlooks=Outlooks(SHAPES, SLO), expected=CALM)  # type: ignore[arg-type]


def systems() -> dict[str, System]:
    outlooks = Outlooks(SHAPES, SLO)
    arrivals_s = [each.arrival_s for each in TRACE]
    return {
        "own": own(),
        "best static": BestStatic(outlooks=outlooks, expected=CALM),
        "static": Static(num_stages=4, replicas=2),
        "cold start": FastColdStart(num_stages=4, per_replica=20),
        "oracle": Oracle(outlooks=outlooks, expected=CALM, arrivals_s=arrivals_s),
    }


def check_books(outcome: Outcome, devices: DevicePool) -> None:
    """Nothing is lost, and what is reserved adds up."""
    assert outcome.figures.requests == len(outcome.requests)
    assert 0 < outcome.utilisation <= 1
    assert all(device.free_bytes >= 0 for device in devices.devices)
    assert all(
        each.first_token_s is not None and each.end_s is not None and each.arrival_s < each.first_token_s <= each.end_s
        for each in outcome.requests
        if each.is_served
    )


@pytest.mark.parametrize("name", systems())
def test_every_system_serves_every_request(name: str) -> None:
    devices = pool()
    outcome = simulate(SETTING, devices, systems()[name])

    assert outcome.figures.failed == 0
    check_books(outcome, devices)


def test_the_seed_decides_everything() -> None:
    first, again = (simulate(SETTING, pool(occupancy=0.3), own()) for _ in range(2))

    assert first == again


def test_scale_to_zero_and_a_request_that_wakes_it() -> None:
    late = drawn_trace(CALM, duration_s=20.0, seed=4)
    trace = (*late, *(replace(each, arrival_s=each.arrival_s + 2000) for each in late))
    outcome = simulate(replace(SETTING, trace=trace), pool(), own(min_replicas=0, idle_s=60.0))

    assert outcome.figures.failed == 0
    assert any(not each.replicas for each in outcome.samples)
    assert outcome.starts >= 2


def test_memory_that_neighbours_take_shrinks_the_kv_cache() -> None:
    devices = pool(devices=4)
    taken = MemoryChange(at_s=50.0, device=0, num_bytes=30 * 10**9)
    freed = replace(taken, at_s=150.0, num_bytes=-30 * 10**9)

    outcome = simulate(replace(SETTING, memory_changes=(taken, freed)), devices, Static(num_stages=4, replicas=1))

    assert (outcome.evicted, outcome.figures.failed) == (0, 0)
    check_books(outcome, devices)


def test_a_replica_without_room_goes_and_its_requests_go_on_elsewhere() -> None:
    devices = pool(devices=8)
    taken = MemoryChange(at_s=50.0, device=0, num_bytes=70 * 10**9)

    outcome = simulate(replace(SETTING, memory_changes=(taken,)), devices, Static(num_stages=4, replicas=2))

    assert (outcome.evicted, outcome.figures.failed) == (1, 0)
    check_books(outcome, devices)


def test_whole_devices_only() -> None:
    devices = pool(occupancy=0.4)
    room = devices.room_for(SHAPES[8], placing=Placing.WHOLE)

    assert room < devices.room_for(SHAPES[8])
    assert devices.find(SHAPES[32], now_s=0.0, placing=Placing.WHOLE) is None


def test_a_pool_never_puts_two_stages_on_a_device() -> None:
    devices = pool(devices=8)
    for _ in range(2):
        placed = devices.find(SHAPES[4], now_s=0.0)
        assert placed is not None
        devices.take(placed)

    assert [device.stages for device in devices.devices] == [1] * 8
    assert devices.find(SHAPES[4], now_s=0.0) is None


def on_hosts(*hosts: str, host_memory_ratio: float = 2.0) -> DevicePool:
    """Return whole devices, one on each of these hosts."""
    return DevicePool(
        devices=[PoolDevice(index=i, host=host, total_bytes=opt_66b.DEVICE_BYTES) for i, host in enumerate(hosts)],
        host_memory_ratio=host_memory_ratio,
    )


def start_and_end(devices: DevicePool, stages: int, *, at_s: float = 0.0) -> Placed:
    """Return where a replica was while it was there."""
    placed = devices.find(SHAPES[stages], now_s=at_s)
    assert placed is not None
    devices.take(placed)
    devices.give_back(placed, now_s=at_s)
    return placed


def test_parameters_are_warm_where_they_were_however_long_ago_and_in_every_granularity() -> None:
    devices = on_hosts(*"hhhhhhhh")  # room for all parameters of OPT-66B
    assert [start_and_end(devices, stages, at_s=99_999.0 * stages).is_warm for stages in (4, 4, 8)] == [
        False,
        True,
        True,
    ]


def test_hosts_keep_what_they_had_and_stages_go_where_their_layers_are() -> None:
    devices = on_hosts(*"abcdefgh")
    before = start_and_end(devices, 8)
    assert not before.is_warm
    for device in devices.devices[:4]:  # others are tried first now
        device.others_bytes = device.total_bytes // 2
    again = start_and_end(devices, 8)
    assert again.is_warm
    stage_of = dict(zip([device.host for device in before.devices], before.stages, strict=True))
    assert [stage_of[device.host] for device in again.devices] == list(again.stages)
    assert [device.host for device in again.devices] != [device.host for device in before.devices]
    assert not start_and_end(devices, 4).is_warm  # of two stages each host had one only


def test_with_too_little_memory_hosts_give_up_what_was_loaded_longest_ago() -> None:
    devices = on_hosts(*"hhhhhhhh", host_memory_ratio=0.4)  # half of the parameters
    [host] = devices.hosts.values()
    start_and_end(devices, 8)
    assert [host.has(stage, 8) for stage in range(8)] == [False] * 4 + [True] * 4
    assert not start_and_end(devices, 8).is_warm
    assert host.kept.held_bytes <= host.budget_bytes
    assert on_hosts("h", host_memory_ratio=0.0).hosts["h"].budget_bytes == 0


def test_occupied_devices_are_as_full_as_asked() -> None:
    devices = pool(devices=200, occupancy=0.47).devices

    used = sum(device.others_bytes for device in devices) / sum(device.total_bytes for device in devices)
    assert used == pytest.approx(0.47, abs=0.01)
    assert 0 < mostly_free(devices) < 0.3


def test_multiplexed_prompts_hide_behind_decoding() -> None:
    times, both = SHAPES[4].times, multiplexed(SHAPES[4].times, overlap=0.5)
    prompt, decode = prefill_batch(tokens=1000), decode_batch(sequences=8, context_tokens=100)
    assert both.stages[0](decode) == times.stages[0](decode)
    assert both.stages[0](prompt) < 0.6 * times.stages[0](prompt)


def test_instances_that_share_tensors_read_them_once_each() -> None:
    times, shared = SHAPES[4].times, sharing_tensors(SHAPES[4].times, instances=2)
    small, large = decode_batch(sequences=1, context_tokens=10), decode_batch(sequences=16, context_tokens=10)
    assert shared.stages[0](small) == times.stages[0](small)
    assert shared.stages[0](large) == pytest.approx(2 * times.stages[0](large), rel=0.05)


def test_stalls_begin_and_end_at_the_papers_thresholds() -> None:
    ttfts_s = [1.0] * 20 + [1.4, 1.6, 3.0, 1.3, 1.1] + [1.0] * 5
    requests = [
        RequestTimes(arrival_s=at_s, first_token_s=at_s + ttft_s, end_s=at_s + ttft_s, prompt_tokens=1, output_tokens=1)
        for at_s, ttft_s in zip(range(0, 300, 10), ttfts_s, strict=True)
    ]

    assert stall_lengths(requests) == [pytest.approx(241.1 - 211.6)]


def test_an_unended_request_counts_as_failed() -> None:
    crowd = drawn_trace(replace(CALM, rate_per_s=200.0), duration_s=30.0, seed=1)
    outcome = simulate(replace(SETTING, trace=crowd, drain_s=10.0), pool(devices=4), Static(num_stages=4, replicas=1))

    assert outcome.figures.failed > 0
    assert outcome.figures.attainment < 1


def test_requests_go_where_the_daemon_would_send_them() -> None:
    """Of one granularity each, 60 requests at once: each choice is that of ``choose_replica`` for what is there."""
    fleet = Fleet(Clock(), pool(), SHAPES, FleetEvents(), placing=Placing.FRAGMENTS, expected=CALM)
    sizes = sorted(SHAPES)[:3]
    for stages in sizes:
        assert fleet.add(stages, start_s=0.0)
    fleet.clock.run(until_s=0.0)
    sent: list[list[Job]] = [[] for _ in sizes]
    for number in range(60):
        tokens = 100 + 37 * number % 900
        job = Job(context_tokens=tokens, prefill_tokens=tokens, output_tokens=CALM.output_tokens_mean)
        options = [
            Option(
                replica=index,
                load=Jobs(jobs),
                kv_capacity_tokens=member.placed.kv_tokens,
                pace=Pipeline(member.shape.times_with(member.placed.kv_tokens), CALM),
            )
            for index, (member, jobs) in enumerate(zip(fleet.members, sent, strict=True))
        ]
        sent[choose_replica(job, options).replica].append(job)
        fleet.submit(SimulatedRequest(number=number, arrival_s=0.0, prompt_tokens=tokens, output_tokens=10))
        assert [each.replica.live for each in fleet.members] == [len(jobs) for jobs in sent]
    assert all(sent)


@dataclass(kw_only=True)
class Removing:
    """Two replicas, of which one is to go after a minute."""

    told_s: list[float] = field(default_factory=list)

    def begin(self, fleet: Fleet) -> None:
        self._fleet = fleet
        Static(num_stages=4, replicas=2).begin(fleet)

    def tick(self, observation: Observation, now_s: float) -> str:  # noqa: ARG002
        if now_s == 60.0:
            self._fleet.remove(4, done=lambda _well: self.told_s.append(self._fleet.clock.now_s))
        return "one goes"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return now_s


@pytest.mark.parametrize(("deadline_s", "ends_s"), [(20.0, 80.0), (1e6, None)])
def test_what_a_replica_that_leaves_has_not_finished_by_the_deadline_goes_on_elsewhere(
    deadline_s: float, ends_s: float | None
) -> None:
    """As in the daemon: its devices are free then, and no request is lost. Without a deadline it takes minutes."""
    long = [replace(each, arrival_s=0.1 * number, output_tokens=2000) for number, each in enumerate(TRACE[:40])]
    system, devices = Removing(), pool(devices=8)
    outcome = simulate(replace(SETTING, trace=long, drain_s=5000.0, drain_deadline_s=deadline_s), devices, system)

    [told_s] = system.told_s
    assert told_s == ends_s or (ends_s is None and told_s > 100)
    held = {each.at_s: each.devices for each in outcome.samples}
    assert (held[60.0], held[85.0]) == (8, 4 if ends_s else 8)
    assert (outcome.figures.failed, outcome.evicted) == (0, 0)
    check_books(outcome, devices)
