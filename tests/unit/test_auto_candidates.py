"""The policy's candidates: planned once for each layout, predicted once for each kind of load."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest

from engines.fake import FAKE_CAPABILITIES, FakeEngine
from flexpiped.auto_candidates import CHANGED_AGE_S, PLAN_AGE_S, PlannedCandidates, workload_seen
from flexpiped.config_values import Auto
from planner.candidate_plan import PlanAnswer
from planner.granularity import Candidate, ScoreConstants, scores
from planner.layout import Pipeline, pipeline_of
from planner.load import LoadMonitor
from planner.planning import plan
from planner.question import EngineLimits, PlanQuestion
from planner.start_times import ExpectedStart, Origin
from planner.workload import Slo, Workload
from tests.support.costs import FlatCosts
from tests.support.graphs import SMALL_LLAMA, graph_of
from tests.support.layouts import even_pipeline
from topology.device import Device, cpu_devices
from topology.topology import HostTopology
from topology.units import GIB, MIB

GRAPH = graph_of(SMALL_LLAMA)
EXPECTED = Workload(rate_per_s=1.0, prompt_tokens_mean=20, output_tokens_mean=10)


class Planner:
    """Plans for four CPU devices, of which others use some, and notes what it was asked."""

    def __init__(
        self, *, shared: frozenset[str] = frozenset(), kv_tokens: int | None = None, hides_taken: bool = False
    ) -> None:
        self.plans = 0
        self._kv_tokens = kv_tokens
        self._hides_taken = hides_taken
        self.taken: frozenset[str] = frozenset()
        self.resident: Sequence[tuple[str, ...]] = ()
        self._shared = shared

    def devices(self) -> Sequence[Device]:
        return [
            replace(each, memory_reserved_bytes=MIB, memory_others_bytes=MIB) if each.id in self._shared else each
            for each in cpu_devices(count=4, memory_bytes=GIB)
        ]

    def answer(
        self,
        stages: int | Auto,
        *,
        current: Pipeline | None,  # noqa: ARG002
        resident: Sequence[tuple[str, ...]] = (),
        taken: frozenset[str] = frozenset(),
    ) -> PlanAnswer:
        self.plans += 1
        self.taken, self.resident = taken, resident
        here = HostTopology(host_id="h", devices=tuple(self.devices()))
        question = PlanQuestion(
            graph=GRAPH,
            costs=FlatCosts(),
            topology=here.without(taken) if self._hides_taken else here,
            num_stages=None if stages is Auto.AUTO else stages,
            engine=EngineLimits(max_stages=4, kv_tokens=self._kv_tokens),
        )
        return plan(question, clock=lambda: 0.0)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    engine = FakeEngine(pipeline=even_pipeline(2))
    await engine.start(on_progress=lambda _: None)
    yield engine
    await engine.close()


async def test_what_is_alike_is_planned_and_predicted_once(engine: FakeEngine) -> None:
    planner, now_s = Planner(), [0.0]
    source = PlannedCandidates(resolver=lambda: planner, expected=EXPECTED, slo=Slo(), clock=lambda: now_s[0])
    seen = LoadMonitor(began_s=0.0).observe(1.0)
    first = await source.of(engine, seen)
    assert [each.num_stages for each in first] == [1, 2, 3, 4]
    assert await source.of(engine, seen) is first
    assert planner.plans == 1
    now_s[0] = PLAN_AGE_S + 1
    assert await source.of(engine, seen) is not first
    assert planner.plans == 2


async def test_a_replica_takes_as_long_to_start_as_was_measured(engine: FakeEngine) -> None:
    planner, start = Planner(), ExpectedStart(took_s=4.0, origin=Origin.KEPT, cold_s=None)
    known = {1: start, 2: replace(start, took_s=6.0)}
    source = PlannedCandidates(
        resolver=lambda: planner,
        expected=EXPECTED,
        slo=Slo(),
        start=known.get,
    )
    found = await source.of(engine, LoadMonitor(began_s=0.0).observe(1.0))
    assert [each.start_s for each in found] == [4.0, 6.0, 0.0, 0.0]
    assert [bool(each.start_in_words) for each in found] == [True, True, False, False]
    known[1] = replace(start, took_s=40.0, origin=Origin.STORAGE)  # it had to leave the memory of the host
    now = await source.starting_now(found)
    assert [each.start_s for each in now] == [40.0, 6.0, 0.0, 0.0]
    assert now[0].start_in_words.endswith("its parameters come from storage")
    assert planner.plans == 1


async def test_other_lengths_are_predicted_anew_without_a_plan(engine: FakeEngine) -> None:
    planner = Planner()
    source = PlannedCandidates(resolver=lambda: planner, expected=EXPECTED, slo=Slo(), clock=lambda: 0.0)
    monitor = LoadMonitor(began_s=0.0)
    short = await source.of(engine, monitor.observe(1.0))
    monitor.arrived(1, 1.0)
    monitor.ended(1, 2.0, output_tokens=200, tpot_s=0.01)
    long = await source.of(engine, monitor.observe(2.0))
    assert planner.plans == 1
    assert long[0].throughput_per_s < short[0].throughput_per_s
    source.expect(EXPECTED, Slo(ttft_s=1.0))
    assert await source.of(engine, monitor.observe(2.0)) is not long


def test_what_was_not_seen_is_as_expected() -> None:
    assert workload_seen(LoadMonitor(began_s=0.0).observe(1.0), EXPECTED) == EXPECTED


async def test_further_replicas_have_the_devices_that_nobody_has(engine: FakeEngine) -> None:
    planner = Planner()
    other = pipeline_of(device_ids=["cpu:2"], cuts=[], num_decoders=8)
    serving = [engine.pipeline]
    source = PlannedCandidates(resolver=lambda: planner, serving=lambda: serving, expected=EXPECTED, slo=Slo())
    seen = LoadMonitor(began_s=0.0).observe(1.0)
    assert [each.most_replicas for each in await source.of(engine, seen)] == [3, 2, 1, 1]
    serving.append(other)
    assert [each.most_replicas for each in await source.of(engine, seen)] == [3, 2, 2, 2]
    assert (planner.plans, planner.taken) == (2, {"cpu:2"})


async def test_what_another_replica_has_is_known_though_the_main_one_could_not_have_it() -> None:
    """Beside one of three stages one device is left: what the policy did not know it left alone, whatever came."""
    planner, main = Planner(hides_taken=True), pipeline_of(device_ids=["cpu:0"], cuts=[], num_decoders=8)
    large = pipeline_of(device_ids=["cpu:1", "cpu:2", "cpu:3"], cuts=[3, 6], num_decoders=8)
    alone = FakeEngine(pipeline=main)
    await alone.start(on_progress=lambda _: None)
    source = PlannedCandidates(resolver=lambda: planner, serving=lambda: [main, large], expected=EXPECTED, slo=Slo())
    found = await source.of(alone, LoadMonitor(began_s=0.0).observe(1.0))
    assert [(each.num_stages, each.room) for each in found] == [(1, 0), (3, 0)]
    assert (planner.plans, planner.taken) == (2, {"cpu:0"})
    await alone.close()


async def test_room_for_further_replicas_is_what_others_leave_now_and_a_large_change_is_planned_anew(
    engine: FakeEngine,
) -> None:
    """Engines here have KV caches of a configured size, so a stage needs as much on any device."""
    planner, now_s, monitor = Planner(kv_tokens=1024), [0.0], LoadMonitor(began_s=0.0)
    source = PlannedCandidates(resolver=lambda: planner, expected=EXPECTED, slo=Slo(), clock=lambda: now_s[0])

    async def seen(others: dict[str, int]) -> list[int | None]:
        now_s[0] += 5.0
        monitor.devices_seen(now_s[0], others)
        return [each.room for each in await source.of(engine, monitor.observe(now_s[0]))]

    assert await seen({}) == [2, 1, 0, 0]  # cpu:2 and cpu:3 are nobody's
    assert await seen({"cpu:3": GIB - 10_000}) == [1, 0, 0, 0]
    assert await seen({"cpu:2": GIB - 10_000, "cpu:3": GIB - 10_000}) == [0, 0, 0, 0]
    assert await seen({"cpu:0": GIB}) == [2, 1, 0, 0]
    assert planner.plans == 1
    now_s[0] = CHANGED_AGE_S + 5.0
    await seen({"cpu:3": GIB // 20})  # as much as a neighbour breathes
    assert planner.plans == 1
    await seen({"cpu:3": GIB // 10})
    assert planner.plans == 2


async def test_what_others_use_of_the_devices_costs_a_granularity_its_score(engine: FakeEngine) -> None:
    seen, constants = LoadMonitor(began_s=0.0).observe(1.0), ScoreConstants()

    async def widest(planner: Planner) -> Candidate:
        source = PlannedCandidates(resolver=lambda: planner, expected=EXPECTED, slo=Slo())
        return (await source.of(engine, seen))[-1]

    alone, beside = await widest(Planner()), await widest(Planner(shared=frozenset({"cpu:3"})))
    assert [(each.num_stages, each.devices, each.shared_devices) for each in (alone, beside)] == [(4, 4, 0), (4, 4, 1)]
    lost = scores([alone], cv=3.0, constants=constants)[0] - scores([beside], cv=3.0, constants=constants)[0]
    assert lost == pytest.approx(constants.shared * (1 + constants.shared_per_cv2 * 9) / 4, rel=0.01)


async def test_ranks_that_are_resident_are_planned_with() -> None:
    ranks, planner = (("cpu:0",), ("cpu:1",)), Planner()
    engine = FakeEngine(pipeline=even_pipeline(2), capabilities=replace(FAKE_CAPABILITIES, resident=ranks))
    await engine.start(on_progress=lambda _: None)
    source = PlannedCandidates(resolver=lambda: planner, expected=EXPECTED, slo=Slo())
    await source.of(engine, LoadMonitor(began_s=0.0).observe(1.0))
    assert planner.resident == ranks
    await engine.close()
