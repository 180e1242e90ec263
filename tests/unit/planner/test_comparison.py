"""Which candidate is best: one aim after the other, each within what the aims before reached."""

from dataclasses import replace
from math import inf

from planner.candidate_plan import Costs, Found
from planner.comparison import choose
from planner.layout import pipeline_of
from planner.prediction import Prediction
from planner.workload import Workload

WORKLOAD = Workload(rate_per_s=10.0)


def found(stages: int = 2, **values: object) -> Found:
    """Return a candidate; names of ``Costs`` and ``Prediction`` go where they belong."""
    prediction = Prediction(
        ttft_s=0.1,
        ttft_p99_s=0.2,
        tpot_s=0.01,
        batch=4,
        max_batch=16,
        throughput_tokens_per_s=100,
        capacity_per_s=20,
        capacity_tokens_per_s=200,
        load=0.5,
        goodput_per_s=10.0,
        attainment=1.0,
    )
    costs = Costs(change_s=0.0, fragmentation=0, moved_bytes=0)
    plain = Found(
        pipelines=(pipeline_of(device_ids=[f"cpu:{n}" for n in range(stages)], cuts=range(1, stages), num_decoders=8),),
        prediction=prediction,
        kv_tokens=1000,
        best_cv=1.0,
        bottleneck_s=0.01,
        gap=0.0,
        nested=True,
        nested_loss=0.0,
        optimal=True,
        costs=costs,
        memory=(),
    )
    of_prediction = {name: values.pop(name) for name in list(values) if hasattr(prediction, name)}
    of_costs = {name: values.pop(name) for name in list(values) if hasattr(costs, name)}
    return replace(
        plain,
        prediction=replace(prediction, **of_prediction),  # type: ignore[arg-type]
        costs=replace(costs, **of_costs),  # type: ignore[arg-type]
        **values,  # type: ignore[arg-type]
    )


def test_goodput_comes_first() -> None:
    choice = choose({0: found(goodput_per_s=5.0, kv_tokens=9999), 1: found()}, WORKLOAD)
    assert (choice.best, choice.decided_by) == (1, "goodput")
    assert choice.reasons[0] == "50 % less goodput: 5 of 10 requests/s in time"


def test_a_percent_of_goodput_is_given_for_kv_capacity() -> None:
    choice = choose({0: found(), 1: found(goodput_per_s=9.95, kv_tokens=2000)}, WORKLOAD)
    assert (choice.best, choice.decided_by) == (1, "KV capacity")
    assert choice.reasons[0] == "KV cache for 1,000 tokens, 2,000 are possible"
    assert choose({0: found(), 1: found(goodput_per_s=9.8, kv_tokens=2000)}, WORKLOAD).best == 0


def test_then_the_cost_of_the_change_then_fragmentation_then_bytes() -> None:
    costly = found(change_s=0.5)
    broken = found(stages=4, fragmentation=400)
    moving = found(moved_bytes=3 << 20)
    choice = choose({0: costly, 1: broken, 2: moving, 3: found()}, WORKLOAD)
    assert choice.best == 3
    assert choice.reasons == {
        0: "the change costs 500 ms more and serves no better",
        1: "takes 2 more devices and serves no better",
        2: "moves 3 MiB more and serves no better",
    }


def test_what_is_equal_goes_by_the_first_token_and_then_by_stages() -> None:
    choice = choose({0: found(ttft_s=0.2), 1: found(stages=3), 2: found()}, WORKLOAD)
    assert choice.best == 2
    assert choice.reasons == {0: "first token 100 % later, and no better otherwise", 1: "more stages, and no better"}


def test_a_candidate_whose_queue_grows_for_ever_can_be_compared() -> None:
    assert choose({0: found(ttft_s=inf), 1: found(ttft_s=inf)}, WORKLOAD).best == 0
    assert choose({0: found(ttft_s=inf), 1: found()}, WORKLOAD).reasons == {0: "the queue grows without bound"}


def test_the_only_one_is_the_best() -> None:
    assert choose({7: found()}, WORKLOAD).best == 7
