"""nu_k, the CV at which each layout does best against the others, held against simulations of the same requests."""

from collections.abc import Sequence
from dataclasses import replace

from planner.prediction import PipelineTimes, best_cvs, predict
from planner.request_figures import Figures, figures
from planner.traces import drawn_trace
from planner.workload import Slo, Workload
from tests.support.simulated import pipeline_of, served, times_of

CVS = (0.25, 1.0, 2.0, 4.0, 8.0)
FEW, MANY = pipeline_of(1, slots=16), pipeline_of(8, slots=128, hop_s=0.02)
SLO = Slo(ttft_s=1.0)
CALM = Workload(prompt_tokens_mean=200, prompt_tokens_cv=0.3, output_tokens_mean=100, output_tokens_cv=0.3)
WORKLOAD = replace(CALM, rate_per_s=0.4 * predict(FEW, CALM).capacity_per_s)


def simulated(times: PipelineTimes, cv: float) -> Figures:
    trace = drawn_trace(replace(WORKLOAD, cv=cv), duration_s=600.0, seed=3)
    return figures(times_of(served(times, trace)), SLO)


def merit(found: Figures) -> float:
    """Return what nu_k is chosen by: requests in time, and how soon the last of a hundred has its first token."""
    p99_s = found.ttft_s.percentiles["p99"]
    assert p99_s is not None
    return found.attainment / p99_s


def best(gains: Sequence[float]) -> float:
    return CVS[gains.index(max(gains))]


def test_layouts_win_in_a_simulation_in_the_same_order_of_cvs_as_predicted() -> None:
    predicted = best_cvs([FEW, MANY], WORKLOAD, SLO)
    gains = [merit(simulated(FEW, cv)) / merit(simulated(MANY, cv)) for cv in CVS]

    assert predicted[0] is not None
    assert predicted[1] is not None
    few, many = best(gains), best([1 / each for each in gains])
    assert (predicted[0] < predicted[1], few < many) == (True, True), (predicted, gains)
    assert gains[CVS.index(few)] > 1 > gains[CVS.index(many)]  # each really wins where it does best
    assert predicted[0] <= 1.0 <= 2.0 <= predicted[1]
