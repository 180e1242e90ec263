"""How a request's KV cache should get to another instance: copied over the link, or computed again from its tokens.

The decision is made and logged for each request that a replica handover takes over. Carried out for now is recompute
only: it needs nothing of an engine and is token-exact for every engine whose draws depend on seed and position. The
copy comes with the engines' KV connectors.
"""

from dataclasses import dataclass
from enum import Enum

from topology.units import format_bytes


class KvRoute(Enum):
    COPY = "copy"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRouteCosts:
    """What the decision rests on. A figure that has not been measured is None, and never taken for zero.

    ``num_tokens`` is prompt and generated tokens together.
    """

    num_tokens: int
    kv_bytes_per_token: int
    link_bytes_per_s: float | None = None
    link_latency_s: float = 0.0
    prefill_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.link_bytes_per_s, self.prefill_tokens_per_s) if rate is not None]
        if min(self.num_tokens, self.kv_bytes_per_token, self.link_latency_s) < 0 or min(rates, default=1) <= 0:
            raise ValueError(f"impossible costs: {self}")

    @property
    def kv_bytes(self) -> int:
        return self.num_tokens * self.kv_bytes_per_token

    @property
    def copy_s(self) -> float | None:
        rate = self.link_bytes_per_s
        return None if rate is None else self.link_latency_s + self.kv_bytes / rate

    @property
    def recompute_s(self) -> float | None:
        rate = self.prefill_tokens_per_s
        return None if rate is None else self.num_tokens / rate


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDecision:
    """The route with the sentence that explains it."""

    route: KvRoute
    reason: str


def decide_kv_route(costs: KvRouteCosts) -> KvDecision:
    """Return the faster route.

    1. No link is known: recompute.
    2. The prefill rate is unknown: recompute, which needs no trust in the link.
    3. Copy when it takes less time than recompute, else recompute.
    """
    copy_s, recompute_s = costs.copy_s, costs.recompute_s
    if copy_s is None:  # 1
        return KvDecision(route=KvRoute.RECOMPUTE, reason="the bandwidth of the link is not known")
    if recompute_s is None:  # 2
        return KvDecision(route=KvRoute.RECOMPUTE, reason="the prefill rate has not been measured")
    route = KvRoute.COPY if copy_s < recompute_s else KvRoute.RECOMPUTE  # 3
    amounts = f"copying {format_bytes(costs.kv_bytes)} takes {copy_s:.3g} s, computing {costs.num_tokens} tokens again"
    return KvDecision(route=route, reason=f"{amounts} {recompute_s:.3g} s")
