"""The daemon's policy in the simulator: it adapts, hears of changes as in the daemon, and its decisions are counted."""

from dataclasses import dataclass, field, replace

import pytest

from planner.load import Observation
from planner.policy_state import Action, PolicyConstants, Verb
from planner.simulation.baselines import FastColdStart, Static
from planner.simulation.fleet import Fleet
from planner.simulation.outcome import most_in_a_minute
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.pool import DevicePool, PoolDevice
from planner.simulation.run import MemoryChange, Setting, simulate
from planner.simulation.shape import Shape
from planner.traces import TraceRequest, drawn_trace
from planner.workload import Workload
from tests.support.simulated import pipeline_of
from tests.unit.simulation.test_run import CALM, SETTING, SHAPES, SLO, TRACE, own, pool


def test_the_policy_adds_replicas_when_more_comes_and_removes_them_after() -> None:
    system = own(reclaim_s=60.0)

    outcome = simulate(replace(SETTING, trace=rise_and_fall()), pool(devices=64), system)

    assert outcome.figures.failed == 0
    counts = [sum(each.replicas.values()) for each in outcome.samples]
    assert max(counts) > counts[0]
    assert counts[-1] < max(counts)
    assert any("instead of" in each.reason for each in system.decisions)


@dataclass(kw_only=True)
class Overheard:
    """flexpiped, and when the last action had ended as the load monitor knew it at each look."""

    system: Flexpiped
    heard_s: list[float | None] = field(default_factory=list)

    def begin(self, fleet: Fleet) -> None:
        self.system.begin(fleet)

    def tick(self, observation: Observation, now_s: float) -> str:
        since = observation.since_change
        self.heard_s.append(None if since is None else since.at_s)
        return self.system.tick(observation, now_s)

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:
        return self.system.rests_until_s(observation, now_s, next_s=next_s)

    @property
    def begun(self) -> list[tuple[float, Action]]:
        return [(each.at_s, each.action) for each in self.system.decisions if each.action is not None]

    def ended_s(self, began_s: float) -> float:
        """Return when the action that began then had ended."""
        return min(each for each in self.heard_s if each is not None and each >= began_s)


def rise_and_fall() -> tuple[TraceRequest, ...]:
    burst = drawn_trace(replace(CALM, rate_per_s=25.0), duration_s=120.0, seed=2)
    after = drawn_trace(CALM, duration_s=900.0, seed=3)
    return (
        *TRACE,
        *(replace(each, arrival_s=each.arrival_s + 200) for each in burst),
        *(replace(each, arrival_s=each.arrival_s + 320) for each in after),
    )


def test_the_load_monitor_hears_of_every_action_when_it_has_ended_as_in_the_daemon() -> None:
    system = Overheard(system=own(reclaim_s=60.0))

    outcome = simulate(replace(SETTING, trace=rise_and_fall()), pool(devices=64), system)

    assert {action.verb for _, action in system.begun} >= {Verb.ADD, Verb.REMOVE}
    assert outcome.figures.failed == 0
    for began_s, action in system.begun:
        took_s = system.ended_s(began_s) - began_s
        shape = SHAPES[action.num_stages]
        if action.verb is Verb.ADD:
            from_storage = range(action.count + 1)
            each_s = [cold * shape.cold_s + (action.count - cold) * shape.warm_s for cold in from_storage]
            assert any(took_s == pytest.approx(expected_s) for expected_s in each_s)  # one after the other
        else:
            assert 0 <= took_s < 120  # its last requests end first
    assert any(system.ended_s(at_s) > at_s for at_s, action in system.begun if action.verb is Verb.REMOVE)


def test_replicas_come_one_after_the_other_as_in_the_daemon() -> None:
    system = own(reclaim_s=60.0)

    outcome = simulate(replace(SETTING, trace=rise_and_fall()), pool(devices=64), system)

    assert max(each.action.count for each in system.decisions if each.action is not None) > 1
    assert max(each.coming for each in outcome.samples) == 1


def test_of_several_replicas_none_comes_after_one_for_which_neighbours_have_left_no_room() -> None:
    def added(*memory_changes: MemoryChange) -> tuple[Overheard, list[int]]:
        system = Overheard(system=own(reclaim_s=60.0))
        setting = replace(SETTING, trace=rise_and_fall(), memory_changes=memory_changes)
        outcome = simulate(setting, pool(devices=64), system)
        return system, [sum(each.replicas.values()) for each in outcome.samples]

    well, _ = added()
    began_s, action = next(each for each in well.begun if each[1].verb is Verb.ADD and each[1].count > 2)
    first_s = began_s + SHAPES[action.num_stages].cold_s
    all_devices = [MemoryChange(at_s=first_s - 1, device=index, num_bytes=70 * 10**9) for index in range(64)]
    freed = [replace(each, at_s=first_s + 120, num_bytes=-each.num_bytes) for each in all_devices]
    failing, counts = added(*all_devices, *freed)

    assert failing.begun[0][0] <= began_s
    assert failing.ended_s(began_s) < well.ended_s(began_s)
    assert max(counts) > 1  # tried again when there was room


def test_where_all_replicas_are_to_go_the_last_one_stays_until_that_is_decided_again() -> None:
    system = own(min_replicas=0, idle_s=60.0, reclaim_s=10_000.0)
    burst = drawn_trace(replace(CALM, rate_per_s=25.0), duration_s=120.0, seed=2)
    last = replace(burst[-1], arrival_s=burst[-1].arrival_s + 900)

    outcome = simulate(replace(SETTING, trace=(*burst, last)), pool(devices=64), system)

    removals = [each.action for each in system.decisions if each.action and each.action.verb is Verb.REMOVE]
    assert outcome.figures.failed == 0
    assert removals[0].count > 1
    assert [each.count for each in removals[1:]] == [1]


def test_decisions_count_once_each_whatever_they_change_and_within_any_minute() -> None:
    system = Overheard(system=own(reclaim_s=60.0))

    outcome = simulate(replace(SETTING, trace=rise_and_fall()), pool(devices=64), system)

    begun_s = [at_s for at_s, _ in system.begun]
    assert (outcome.changes, outcome.decisions) == (0, len(begun_s))
    assert max(action.count for _, action in system.begun) > 1
    assert 1 <= outcome.most_decisions_per_min == most_in_a_minute(begun_s) <= 2


def test_other_systems_decisions_count_likewise() -> None:
    burst = drawn_trace(replace(CALM, rate_per_s=25.0), duration_s=120.0, seed=2)
    setting = replace(SETTING, trace=burst)
    elastic = simulate(setting, pool(), FastColdStart(num_stages=4, per_replica=20))
    static = simulate(setting, pool(), Static(num_stages=4, replicas=2))

    assert (elastic.changes, static.decisions, static.most_decisions_per_min) == (0, 0, 0)
    assert elastic.decisions >= elastic.most_decisions_per_min >= 1


def two_devices() -> DevicePool:
    return DevicePool(devices=[PoolDevice(index=index, host="here", total_bytes=100) for index in range(2)])


def busy_on_two_devices(*, prepare_s: float = 0.0) -> tuple[Setting, Flexpiped]:
    """Beside a stage on one of two devices there is no room for two stages, but instead of it there is."""
    shapes = {stages: replace(small_shape(stages), prepare_s=prepare_s) for stages in (1, 2)}
    calm = Workload(rate_per_s=1.0, prompt_tokens_mean=64, output_tokens_mean=64)
    busy = drawn_trace(replace(calm, rate_per_s=25.0), duration_s=600.0, seed=2)
    constants = PolicyConstants(min_replicas=1, max_replicas=1, cv_window_s=30.0, dwell_s=30.0, expected_dwell_s=300.0)
    system = Flexpiped(constants=constants, outlooks=Outlooks(shapes, SLO), expected=calm)
    return Setting(trace=busy, shapes=shapes, slo=SLO, expected=calm, windows_s=(30.0,)), system


def test_the_policy_knows_a_layout_that_fits_only_in_the_place_of_the_one_in_force() -> None:
    setting, system = busy_on_two_devices()

    outcome = simulate(setting, two_devices(), system)

    assert next(iter(outcome.samples[0].replicas)) == 1
    assert any(each.replicas == {2: 1} for each in outcome.samples)
    assert any("1 -> 2 stages" in each.reason for each in system.decisions)
    assert outcome.figures.failed == 0


def test_the_load_monitor_hears_nothing_of_a_change_that_fails() -> None:
    setting, system = busy_on_two_devices(prepare_s=20.0)
    well = Overheard(system=system)
    simulate(setting, two_devices(), well)
    began_s, action = well.begun[0]
    assert action.verb is Verb.CHANGE
    assert well.ended_s(began_s) == pytest.approx(began_s + 20)

    taken = MemoryChange(at_s=began_s + 5, device=1, num_bytes=90)  # where the second stage would go
    failing = Overheard(system=busy_on_two_devices(prepare_s=20.0)[1])
    outcome = simulate(replace(setting, memory_changes=(taken,)), two_devices(), failing)

    assert failing.begun[0] == (began_s, action)
    assert set(failing.heard_s) == {None}
    assert not any(2 in each.replicas for each in outcome.samples)


def test_a_replica_that_neighbours_drive_out_is_missed_by_the_policy() -> None:
    taken = [MemoryChange(at_s=50.0, device=index, num_bytes=70 * 10**9) for index in range(4)]

    system = Overheard(system=own(max_replicas=1))
    outcome = simulate(replace(SETTING, memory_changes=taken), pool(devices=8), system)

    assert (outcome.evicted, outcome.starts, outcome.figures.failed) == (1, 2, 0)
    assert system.heard_s[8:10] == [None, 50.0]


def small_shape(stages: int) -> Shape:
    return Shape(
        num_stages=stages,
        times=pipeline_of(stages, slots=16),
        stage_weight_bytes=60,
        stage_kv_bytes_per_token=0.0,
        min_kv_tokens=1,
        cold_s=1.0,
        warm_s=1.0,
        pause_s=0.01,
    )


def test_what_sleeps_wakes_up_as_it_was_as_in_the_daemon() -> None:
    """Of all granularities the finest would be ready soonest."""
    late = drawn_trace(CALM, duration_s=20.0, seed=4)
    trace = (*late, *(replace(each, arrival_s=each.arrival_s + 2000) for each in late))
    system = own(min_replicas=0, idle_s=60.0)

    outcome = simulate(replace(SETTING, trace=trace), pool(), system)

    began_with = next(iter(outcome.samples[0].replicas))
    [woken] = [each.action for each in system.decisions if each.action is not None and "a request waits" in each.reason]
    assert (woken.verb, woken.num_stages) == (Verb.ADD, began_with)
    assert began_with < max(SHAPES)
    assert outcome.figures.failed == 0
