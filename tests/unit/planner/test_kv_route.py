"""Copy a request's KV cache to another instance, or compute it again?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.kv_route import KvMeasured, KvPreference, KvRoute, KvRouteCosts, decide_kv_route
from topology.units import KIB, MIB

LONG = KvRouteCosts(
    num_tokens=4096, kv_bytes_per_token=128 * KIB, link_bytes_per_s=10e9, prefill_tokens_per_s=8000.0
)  # 512 MiB: 54 ms over the link, 512 ms of prefill


def test_a_long_request_over_a_fast_link_is_copied() -> None:
    decision = decide_kv_route(LONG)
    assert decision.route is KvRoute.COPY
    assert decision.reason == "copying 512 MiB takes 0.0537 s, computing 4096 tokens again 0.512 s"


def test_a_slow_link_or_a_slow_handshake_is_not_worth_it() -> None:
    slow = KvRouteCosts(
        num_tokens=4096, kv_bytes_per_token=128 * KIB, link_bytes_per_s=100e6, prefill_tokens_per_s=8000.0
    )
    assert decide_kv_route(slow).route is KvRoute.RECOMPUTE
    short = KvRouteCosts(
        num_tokens=8,
        kv_bytes_per_token=128 * KIB,
        link_bytes_per_s=10e9,
        link_latency_s=0.01,
        prefill_tokens_per_s=8000.0,
    )
    assert decide_kv_route(short).route is KvRoute.RECOMPUTE


@pytest.mark.parametrize(
    ("link", "prefill", "route", "reason"),
    [
        (None, 8000.0, KvRoute.COPY, "the link has not been measured, this copy does it"),
        (None, None, KvRoute.COPY, "the link has not been measured, this copy does it"),
        (1e9, None, KvRoute.RECOMPUTE, "the prefill rate has not been measured, this does it"),
    ],
)
def test_what_is_not_known_is_measured(link: float | None, prefill: float | None, route: KvRoute, reason: str) -> None:
    costs = KvRouteCosts(num_tokens=10, kv_bytes_per_token=MIB, link_bytes_per_s=link, prefill_tokens_per_s=prefill)
    decision = decide_kv_route(costs)
    assert (decision.route, decision.reason) == (route, reason)


def test_what_cannot_be_copied_is_not() -> None:
    decision = decide_kv_route(LONG, refusal="the KV caches differ", preference=KvPreference.COPY)
    assert (decision.route, decision.reason) == (KvRoute.RECOMPUTE, "the KV caches differ")


@pytest.mark.parametrize("route", list(KvRoute))
def test_the_operator_may_say_which(route: KvRoute) -> None:
    decision = decide_kv_route(LONG, preference=KvPreference(route.value))
    assert (decision.route, decision.reason) == (route, "the configuration says so (handover.kv)")


def test_the_first_requests_measure_and_the_others_take_the_faster_way() -> None:
    measured, routes = KvMeasured(), []
    for num_tokens in (1000, 1000, 1000, 8):
        route = decide_kv_route(measured.costs(num_tokens=num_tokens, kv_bytes_per_token=KIB)).route
        routes.append(route)
        if route is KvRoute.COPY:
            measured = measured.with_copy(num_bytes=num_tokens * KIB, took_s=num_tokens * KIB / 1e8, waited_s=0.01)
        else:
            measured = measured.with_recompute(num_tokens=num_tokens, took_s=num_tokens / 1000)
    assert routes == [KvRoute.COPY, KvRoute.RECOMPUTE, KvRoute.COPY, KvRoute.RECOMPUTE]
    costs = measured.costs(num_tokens=500, kv_bytes_per_token=KIB)
    assert costs.link_bytes_per_s == pytest.approx(1e8)
    assert costs.link_latency_s == pytest.approx(0.01)
    assert costs.prefill_tokens_per_s == pytest.approx(1000)


def test_a_request_that_took_no_time_measures_nothing() -> None:
    measured = KvMeasured().with_copy(num_bytes=0, took_s=0.0, waited_s=0.0).with_recompute(num_tokens=0, took_s=0.0)
    costs = measured.costs(num_tokens=1, kv_bytes_per_token=1)
    assert (costs.link_bytes_per_s, costs.prefill_tokens_per_s) == (None, None)


@pytest.mark.parametrize("bad", [{"num_tokens": -1}, {"link_bytes_per_s": 0.0}, {"prefill_tokens_per_s": -1.0}])
def test_impossible_costs_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="impossible costs"):
        KvRouteCosts(**{"num_tokens": 1, "kv_bytes_per_token": 1, **bad})  # type: ignore[arg-type]


@given(tokens=st.integers(0, 100_000), per_token=st.integers(0, MIB), link=st.floats(1e3, 1e12), rate=st.floats(1, 1e6))
def test_the_faster_route_is_taken(tokens: int, per_token: int, link: float, rate: float) -> None:
    costs = KvRouteCosts(
        num_tokens=tokens, kv_bytes_per_token=per_token, link_bytes_per_s=link, prefill_tokens_per_s=rate
    )
    copied = decide_kv_route(costs).route is KvRoute.COPY
    assert copied == (tokens * per_token / link < tokens / rate)
