"""The rebuilt evaluation: halves that share nothing, and systems that each run on the paper's cluster."""

from dataclasses import replace

import pytest

from planner.simulation import opt_66b
from planner.simulation.cluster import mostly_free
from planner.traces import Trace, drawn_trace, workload_of
from planner.workload import Slo, Workload
from tests.bench.paper_evaluation import one, pool, row
from tests.bench.paper_systems import others, own, settings_tried
from tests.bench.paper_workloads import Work, read_traces, workloads
from tests.support.traces import TRACE_SKIPPED, trace_folder

FOLDER = trace_folder()
SLO = Slo(ttft_s=5.0, tpot_s=0.4)
SHAPES = opt_66b.shapes()
CONTESTANTS = {each.name: each for each in [own(SHAPES, SLO, settings_tried()[0]), *others(SHAPES, SLO)]}


def numbered(trace: Trace, *, begin: int = 0) -> Trace:
    """Return a trace whose requests can be told apart wherever they turn up: nothing here looks at prefixes."""
    return tuple(replace(each, prefix_ids=(begin + number,)) for number, each in enumerate(trace))


def found_in(conv: Trace, code: Trace) -> list[Work]:
    return workloads(numbered(conv), numbered(code, begin=len(conv)), rate_per_s=20.0, half_s=300.0, seed=1)


def check_halves(found: list[Work]) -> None:
    assert [each.name for each in found[:4]] == ["CV 1", "CV 2", "CV 4", "CV 8"]
    for work in found:
        tuning, reported = ({each.prefix_ids for each in half} for half in (work.tuning, work.reported))
        assert tuning.isdisjoint(reported), work.name
        assert min(len(tuning), len(reported)) > 100
        for half in (work.tuning, work.reported):
            assert 0 <= half[0].arrival_s <= half[-1].arrival_s < 300
            assert [each.arrival_s for each in half] == sorted(each.arrival_s for each in half)


def test_halves_of_traces_that_are_over_before_a_half_is_share_nothing() -> None:
    """At 20/s the conversations last 100 s, so each half of 300 s has its own six times over."""
    conv = drawn_trace(Workload(rate_per_s=2.0), duration_s=1000.0, seed=1)
    code = drawn_trace(Workload(rate_per_s=1.0, cv=3.0), duration_s=900.0, seed=2)
    found = found_in(conv, code)

    check_halves(found)
    by_name = {each.name: each for each in found}
    for half in (by_name["Azure conv"].tuning, by_name["Azure conv"].reported):
        assert len(half) > 5 * len({each.prefix_ids for each in half})
        assert workload_of(half).rate_per_s == pytest.approx(20.0, rel=0.05)


@pytest.mark.skipif(FOLDER is None, reason=TRACE_SKIPPED)
def test_workloads_come_in_halves_that_share_nothing() -> None:
    assert FOLDER is not None
    found = found_in(*read_traces(FOLDER))

    check_halves(found)
    for work in found:
        assert max(each.prompt_tokens + each.output_tokens for each in (*work.tuning, *work.reported)) <= 2048
    assert workload_of(found[2].reported).cv == pytest.approx(4.0, rel=0.3)


def test_the_cluster_is_the_papers() -> None:
    devices = pool(1).devices

    assert len(devices) == 82
    assert len({each.host for each in devices}) == 42
    taken = sum(each.others_bytes for each in devices) / sum(each.total_bytes for each in devices)
    assert taken == pytest.approx(0.47, abs=0.01)
    assert mostly_free(devices) < 0.25


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_runs(name: str) -> None:
    """A round costs the same for any number of requests, so there are few events for each of them."""
    calm = Workload(rate_per_s=5.0, prompt_tokens_mean=300, output_tokens_mean=60)
    trace = drawn_trace(calm, duration_s=120.0, seed=1)

    outcome = one(CONTESTANTS[name], trace, trace, slo=SLO, seed=1)

    assert outcome.figures.failed == 0
    assert outcome.events < 12 * len(trace)
    assert row(name, outcome)[0] == name
