"""The rebuilt evaluation: halves that share nothing, and systems that each run on the paper's cluster."""

import pytest

from planner.simulation import opt_66b
from planner.simulation.cluster import mostly_free
from planner.traces import drawn_trace, workload_of
from planner.workload import Slo, Workload
from tests.bench.paper_evaluation import one, pool, row, workloads
from tests.bench.paper_systems import others, own, settings_tried
from tests.support.traces import TRACE_SKIPPED, trace_folder

FOLDER = trace_folder()
SLO = Slo(ttft_s=5.0, tpot_s=0.4)
SHAPES = opt_66b.shapes()
CONTESTANTS = {each.name: each for each in [own(SHAPES, SLO, settings_tried()[0]), *others(SHAPES, SLO)]}


@pytest.mark.skipif(FOLDER is None, reason=TRACE_SKIPPED)
def test_workloads_come_in_halves_that_share_nothing() -> None:
    assert FOLDER is not None
    found = workloads(FOLDER, rate_per_s=20.0, half_s=300.0, seed=1)

    assert [each.name for each in found[:4]] == ["CV 1", "CV 2", "CV 4", "CV 8"]
    for work in found:
        for half in (work.tuning, work.reported):
            assert 0 <= half[0].arrival_s <= half[-1].arrival_s < 300
            assert max(each.prompt_tokens + each.output_tokens for each in half) <= 2048
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
