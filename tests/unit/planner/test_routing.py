"""Which replica a request goes to: expected finish, prefix locality and KV headroom."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.prefixes import SeenPrefixes
from planner.routing import Job, Jobs, Option, choose_replica, expected

JOB = Job(context_tokens=100, prefill_tokens=100, output_tokens=50)
DECODING = Job(context_tokens=200, prefill_tokens=0, output_tokens=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """A pace: a step of ``step_s`` and ``more_s`` for each sequence."""

    step_s: float
    more_s: float = 0.0
    prompt_s: float = 0.001

    def cycle_s(self, sequences: int) -> float:
        return self.step_s + self.more_s * sequences

    def prefill_s_per_token(self) -> float:
        return self.prompt_s


def test_the_expected_finish_adds_prompts_before_it_its_own_and_its_steps_beside_the_others() -> None:
    waiting = Job(context_tokens=300, prefill_tokens=300, output_tokens=10)
    option = Option(replica=1, load=Jobs((DECODING, waiting)))
    found = expected(JOB, option, pace=Fixed(step_s=0.01, more_s=0.002))
    assert (found.first_s, found.rest_s) == pytest.approx(((300 + 100) * 0.001, 50 * (0.01 + 3 * 0.002)))
    assert found.others_s == pytest.approx(2 * 100 * 0.001)
    assert found.finish_s == found.first_s + found.rest_s


def test_of_two_idle_replicas_the_faster_one_serves() -> None:
    slow, fast = Option(replica=1, pace=Fixed(step_s=0.02)), Option(replica=2, pace=Fixed(step_s=0.01))
    assert choose_replica(JOB, (slow, fast)).replica == 2
    assert choose_replica(JOB, (slow, fast)).finish_s == pytest.approx(0.1 + 50 * 0.01)


def test_the_faster_one_serves_until_its_queue_costs_more_than_the_slower_one() -> None:
    slow = Option(replica=1, pace=Fixed(step_s=0.02))

    def fast(jobs: int) -> Option:
        return Option(replica=2, load=Jobs((DECODING,) * jobs), pace=Fixed(step_s=0.008, more_s=0.002))

    chosen = [choose_replica(JOB, (slow, fast(jobs))).replica for jobs in range(8)]
    assert chosen == [2, 2, 2, 1, 1, 1, 1, 1]  # of 3 more: 50 * (0.008 + 4 * 0.002) + 3 * 0.1 > 50 * 0.02


def test_a_burst_does_not_pile_its_prompts_up_where_few_decode() -> None:
    """It would be finished first there, but would wait for its first token."""
    pace = Fixed(step_s=0.01, more_s=0.001)
    prompts = Jobs((Job(context_tokens=1000, prefill_tokens=1000, output_tokens=50),))
    few, many = Option(replica=1, load=prompts, pace=pace), Option(replica=2, load=Jobs((DECODING,) * 25), pace=pace)
    first, later = (expected(replace(JOB, prefill_tokens=10), option, pace=pace) for option in (few, many))
    assert first.finish_s < later.finish_s
    assert choose_replica(replace(JOB, prefill_tokens=10), (few, many)).replica == 2


def test_a_long_prompt_goes_where_it_holds_up_fewer() -> None:
    crowded, slow = (
        Option(replica=1, load=Jobs((DECODING,) * 20), pace=Fixed(step_s=0.01)),
        Option(replica=2, pace=Fixed(step_s=0.02)),
    )
    assert choose_replica(replace(JOB, prefill_tokens=10), (crowded, slow)).replica == 1
    assert choose_replica(JOB, (crowded, slow)).replica == 2


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    pace = Fixed(step_s=0.01)
    cold, warm = Option(replica=1, pace=pace), Option(replica=2, load=Jobs((DECODING,)), cached_tokens=96, pace=pace)
    assert choose_replica(JOB, (cold, warm)).replica == 2
    assert choose_replica(JOB, (cold, warm)).finish_s == pytest.approx(4 * 0.001 + 50 * 0.01)


def test_a_prefix_does_not_outweigh_a_long_queue() -> None:
    pace = Fixed(step_s=0.01)
    long = Job(context_tokens=5000, prefill_tokens=5000, output_tokens=1)
    options = (Option(replica=1, pace=pace), Option(replica=2, load=Jobs((long,)), cached_tokens=96, pace=pace))
    assert choose_replica(JOB, options).replica == 1


def test_a_replica_without_room_in_its_kv_cache_is_waited_for_only_if_that_is_sooner() -> None:
    pace = Fixed(step_s=0.01)
    full = Option(replica=1, load=Jobs((DECODING,)), kv_capacity_tokens=300, pace=pace)
    free = Option(replica=2, load=Jobs((DECODING,)), kv_capacity_tokens=400, pace=pace)
    assert choose_replica(JOB, (full, free)).replica == 2
    assert expected(JOB, full, pace=pace).finish_s == pytest.approx(0.1 + (30 + 50) * 0.01)
    slow = Option(replica=2, kv_capacity_tokens=400, pace=Fixed(step_s=0.1))
    assert choose_replica(JOB, (full, slow)).replica == 1


def test_it_waits_for_as_many_as_must_end_and_no_more() -> None:
    jobs = tuple(Job(context_tokens=100, prefill_tokens=0, output_tokens=left) for left in (5, 10, 1000))
    pace = Fixed(step_s=1.0, prompt_s=0.0)
    asked = Job(context_tokens=100, prefill_tokens=100, output_tokens=10)
    needed = sum(each.context_tokens + each.output_tokens for each in jobs) + 110
    for capacity, steps in ((needed, 0), (needed - 1, 5), (needed - 106, 10), (needed - 110, 10), (needed - 300, 1010)):
        option = Option(replica=1, load=Jobs(jobs), kv_capacity_tokens=int(capacity))
        assert expected(asked, option, pace=pace).finish_s == pytest.approx(steps + 10)


def test_behind_a_queue_it_waits_for_the_queue_too() -> None:
    """Each fills the KV cache, so they are served one after the other."""
    jobs = Jobs((Job(context_tokens=60, prefill_tokens=60, output_tokens=40),) * 5)
    option = Option(replica=1, load=jobs, kv_capacity_tokens=100)
    asked = Job(context_tokens=60, prefill_tokens=60, output_tokens=40)
    assert expected(asked, option, pace=Fixed(step_s=1.0, prompt_s=0.0)).first_s == pytest.approx(5 * 40)


def test_a_cached_prefix_takes_no_further_kv_cache() -> None:
    option = Option(replica=1, load=Jobs((DECODING,)), kv_capacity_tokens=300, cached_tokens=96)
    assert expected(JOB, option, pace=Fixed(step_s=0.01)).finish_s == pytest.approx(0.004 + 50 * 0.01)


def test_where_a_pace_is_unknown_none_counts() -> None:
    known = Option(replica=1, load=Jobs((DECODING,)), pace=Fixed(step_s=0.001))
    unknown = Option(replica=2)
    assert choose_replica(JOB, (known, unknown)).replica == 2


def test_of_equals_the_one_with_fewer_requests_then_the_first() -> None:
    assert choose_replica(JOB, (Option(replica=1, load=Jobs((DECODING,))), Option(replica=2))).replica == 2
    assert choose_replica(JOB, (Option(replica=2), Option(replica=1))).replica == 1


def test_without_a_replica_there_is_no_choice() -> None:
    with pytest.raises(ValueError, match="no replica"):
        choose_replica(JOB, ())


def test_prefixes_are_matched_in_whole_runs_from_the_first_token() -> None:
    seen = SeenPrefixes(capacity_tokens=100, run_tokens=4)
    seen.add(range(10))
    assert seen.match(range(10)) == 8
    assert seen.match([*range(4), 9, 9, 9, 9]) == 4
    assert seen.match([9, *range(10)]) == 0
    assert seen.match(range(3)) == 0


def test_the_run_that_was_not_seen_for_longest_is_forgotten_and_of_one_request_the_last() -> None:
    seen = SeenPrefixes(capacity_tokens=12, run_tokens=4)
    seen.add(range(8))
    seen.add(range(100, 108))
    assert (seen.match(range(8)), seen.match(range(100, 108))) == (4, 8)


def test_a_replica_without_a_prefix_cache_has_seen_nothing() -> None:
    seen = SeenPrefixes(capacity_tokens=0)
    seen.add(range(1000))
    assert seen.match(range(1000)) == 0


@given(
    there=st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 400), st.sampled_from([None, 150, 1000, 3000])),
        min_size=1,
        max_size=8,
    ),
    step_s=st.sampled_from([0.005, 0.02]),
)
def test_none_that_is_passed_over_early_would_have_been_the_best(
    there: list[tuple[int, int, int | None]], step_s: float
) -> None:
    """What cannot be better is not looked at to the end; the choice is that of looking at all."""
    pace = Fixed(step_s=step_s, more_s=0.001)
    options = [
        Option(
            replica=number,
            load=Jobs((DECODING,) * count + (replace(JOB, prefill_tokens=prompt),)),
            kv_capacity_tokens=capacity,
            pace=pace,
        )
        for number, (count, prompt, capacity) in enumerate(there)
    ]
    best = min(options, key=lambda option: expected(JOB, option, pace=pace).order)
    route = choose_replica(JOB, options)
    assert (route.replica, route.finish_s) == (best.replica, expected(JOB, best, pace=pace).finish_s)
