"""Which granularity scores best, how many instances the rate and the queue ask for, and where they go: with numbers."""

from dataclasses import replace

import pytest

from planner.granularity import ScoreConstants, instances, scores
from planner.scaling import ScaleConstants, host_affinity, serves_in_time, wanted_instances
from tests.unit.planner.policies import FOUR, THREE, TWO, candidate


def test_calm_traffic_scores_few_stages_and_bursts_score_many() -> None:
    best = [max(zip(scores(THREE, cv=cv, constants=ScoreConstants()), (2, 4, 8), strict=True))[1] for cv in (0.5, 3, 7)]
    assert best == [2, 4, 8]


def test_score_is_the_papers_with_numbers() -> None:
    one = candidate(1, throughput_per_s=5.0, latency_s=0.1, best_cv=1.0)
    two = candidate(2, throughput_per_s=10.0, latency_s=0.2, best_cv=1.0)
    assert scores((one, two), cv=1.0, constants=ScoreConstants(alpha=0.5)) == (0.75, 0.75)
    away = scores((one, two), cv=5.0, constants=ScoreConstants(alpha=0.5, sigma=4.0))
    assert away == pytest.approx((0.75 / 2.718281828, 0.75 / 2.718281828))


def test_shared_devices_cost_more_in_bursts() -> None:
    shared = replace(TWO, devices=2, shared_devices=2)
    for cv, least in ((0.5, 0.0), (6.0, 0.1)):
        free, taken = (scores((each,), cv=cv, constants=ScoreConstants())[0] for each in (TWO, shared))
        assert free - taken > least


def test_what_never_serves_in_time_scores_nothing() -> None:
    assert scores((TWO, replace(FOUR, best_cv=None)), cv=3.0, constants=ScoreConstants())[1] == 0.0


def test_instances_serve_the_rate() -> None:
    assert [instances(TWO, rate_per_s=r, load_limit=1.0, constants=ScoreConstants()) for r in (0, 10, 10.1, 35)] == [
        1,
        1,
        2,
        4,
    ]


def test_scale_by_the_queue_goes_from_three_tenths_to_all() -> None:
    most = [wanted_instances(most=100, cv=1.0, queue_length=q, constants=ScaleConstants()) for q in (0, 16, 64, 640)]
    assert most[0] == 30
    assert most == sorted(most)
    assert most[-1] == most[-2] == 90


def test_a_scale_up_must_serve_what_waits() -> None:
    constants = ScaleConstants()
    given_s = {"serving_per_s": [3.0], "coming_per_s": [1.0], "deadline_s": 30.0, "constants": constants}
    assert serves_in_time(start_s=5.0, queue_length=100.0, **given_s)  # type: ignore[arg-type]
    assert not serves_in_time(start_s=5.1, queue_length=100.0, **given_s)  # type: ignore[arg-type]
    assert serves_in_time(start_s=99.0, queue_length=0.0, **given_s)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("coming", "together", "in_turns"),
    [(1, 250.0, 250.0), (2, 500.0, 400.0), (3, 750.0, 450.0), (9, 2250.0, 450.0)],
)
def test_the_paper_counts_all_that_come_from_one_start_on_and_here_each_from_its_own(
    coming: int, together: float, in_turns: float
) -> None:
    """Of 10 requests/s each, started in 10 s each: with 35 s for it the third serves 5 s, and the fourth too late."""
    deadline_s, start_s, each_per_s = 35.0, 10.0, 10.0
    assert (deadline_s - start_s) * coming * each_per_s == together  # Eq 12 as it is printed

    def in_time(queue_length: float) -> bool:
        return serves_in_time(
            serving_per_s=[],
            coming_per_s=[each_per_s] * coming,
            start_s=start_s,
            queue_length=queue_length,
            deadline_s=deadline_s,
            constants=ScaleConstants(),
        )

    assert in_time(in_turns)
    assert not in_time(in_turns + 0.1)


def test_hosts_that_held_the_model_lately_come_first() -> None:
    constants = ScaleConstants()
    now, lately, never = (host_affinity(held_ago_s=s, free_devices=2, constants=constants) for s in (0, 300, None))
    assert now == pytest.approx(3.0)
    assert lately == pytest.approx(2.5, abs=0.01)
    assert never == 2.0
