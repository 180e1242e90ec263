"""Copy a request's KV cache to another instance, or compute it again?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.kv_route import KvRoute, KvRouteCosts, decide_kv_route
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
    ("link", "prefill", "reason"),
    [
        (None, 8000.0, "the bandwidth of the link is not known"),
        (None, None, "the bandwidth of the link is not known"),
        (1e9, None, "the prefill rate has not been measured"),
    ],
)
def test_what_is_not_measured_is_recomputed(link: float | None, prefill: float | None, reason: str) -> None:
    costs = KvRouteCosts(num_tokens=10, kv_bytes_per_token=MIB, link_bytes_per_s=link, prefill_tokens_per_s=prefill)
    decision = decide_kv_route(costs)
    assert (decision.route, decision.reason) == (KvRoute.RECOMPUTE, reason)


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
