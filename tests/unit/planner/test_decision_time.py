"""A decision of the policy takes under 5 ms, for 2 to 32 stages: it is made on the loop that serves requests."""

from statistics import median

import pytest

from planner.policy_candidates import candidates_for
from planner.workload import Slo
from tests.bench.auto_decision import busy_observation, decision_times_s
from tests.unit.planner.test_policy_candidates import LENGTHS, of_stages

LIMIT_S = 5e-3


@pytest.mark.parametrize("counts", [(2, 4), tuple(range(2, 33))], ids=["2 candidates", "31 candidates"])
def test_a_decision_takes_less_than_5_ms(counts: tuple[int, ...]) -> None:
    """CPU time of the thread, so that other work on the machine counts little; of many, the one in the middle."""
    candidates = candidates_for([of_stages(count) for count in counts], LENGTHS, Slo())
    assert len(candidates) == len(counts)
    seen = busy_observation(rate_per_s=20.0, seconds=300.0)
    assert median(decision_times_s(candidates, seen, times=31, now_s=300.0)) < LIMIT_S
