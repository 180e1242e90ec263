"""How a request's KV cache gets to another instance: copied over the link, or computed again from its tokens.

The decision rests on what was measured in the same handover: the first request is copied, which measures the link, the
second is computed again, which measures the other instance, and from then on the faster way is taken.
"""

from dataclasses import dataclass, replace
from enum import Enum

from topology.units import format_bytes


class KvRoute(Enum):
    COPY = "copy"
    RECOMPUTE = "recompute"


class KvPreference(Enum):
    """What the operator says about it."""

    AUTO = "auto"  # whichever is faster for the request
    COPY = "copy"  # wherever it can be
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRouteCosts:
    """What the decision rests on. A figure that has not been measured is None, and never taken for zero.

    ``num_tokens`` is prompt and generated tokens together. ``link_latency_s`` is what a copied request waits besides.
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
class KvMeasured:
    """What the requests of this handover took so far, in totals. Counts of zero have measured nothing."""

    copies: int = 0
    copied_bytes: int = 0
    copying_s: float = 0.0
    waited_s: float = 0.0  # by copied requests, until their next token
    recomputed_tokens: int = 0
    recomputing_s: float = 0.0

    @property
    def is_complete(self) -> bool:
        """Both ways have been measured."""
        return self.copies > 0 and self.recomputed_tokens > 0

    def with_copy(self, *, num_bytes: int, took_s: float, waited_s: float) -> "KvMeasured":
        """Return the totals after a request was copied in ``took_s`` and then waited for its next token."""
        return replace(
            self,
            copies=self.copies + 1,
            copied_bytes=self.copied_bytes + num_bytes,
            copying_s=self.copying_s + took_s,
            waited_s=self.waited_s + waited_s,
        )

    def with_recompute(self, *, num_tokens: int, took_s: float) -> "KvMeasured":
        """Return the totals after a request was computed again in ``took_s``."""
        return replace(
            self,
            recomputed_tokens=self.recomputed_tokens + num_tokens,
            recomputing_s=self.recomputing_s + took_s,
        )

    def costs(self, *, num_tokens: int, kv_bytes_per_token: int) -> KvRouteCosts:
        """Return what either way would cost a request of ``num_tokens``."""
        link = self.copied_bytes / self.copying_s if self.copied_bytes and self.copying_s > 0 else None
        prefill = self.recomputed_tokens / self.recomputing_s if self.recomputing_s > 0 else None
        return KvRouteCosts(
            num_tokens=num_tokens,
            kv_bytes_per_token=kv_bytes_per_token,
            link_bytes_per_s=link,
            link_latency_s=self.waited_s / self.copies if self.copies else 0.0,
            prefill_tokens_per_s=prefill or None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDecision:
    """The route with the sentence that explains it."""

    route: KvRoute
    reason: str


def decide_kv_route(
    costs: KvRouteCosts, *, refusal: str = "", preference: KvPreference = KvPreference.AUTO
) -> KvDecision:
    """Return the way to take.

    1. It cannot be copied, as ``refusal`` says: recompute.
    2. The operator has said which.
    3. The link has not been measured: copy, which does. A copy that fails loses nothing.
    4. The prefill rate has not been measured: recompute, which does.
    5. Copy when it takes less time than recompute, else recompute.
    """
    if refusal:  # 1
        return KvDecision(route=KvRoute.RECOMPUTE, reason=refusal)
    if preference is not KvPreference.AUTO:  # 2
        route = KvRoute.COPY if preference is KvPreference.COPY else KvRoute.RECOMPUTE
        return KvDecision(route=route, reason="the configuration says so (handover.kv)")
    copy_s, recompute_s = costs.copy_s, costs.recompute_s
    if copy_s is None:  # 3
        return KvDecision(route=KvRoute.COPY, reason="the link has not been measured, this copy does it")
    if recompute_s is None:  # 4
        return KvDecision(route=KvRoute.RECOMPUTE, reason="the prefill rate has not been measured, this does it")
    route = KvRoute.COPY if copy_s < recompute_s else KvRoute.RECOMPUTE  # 5
    amounts = f"copying {format_bytes(costs.kv_bytes)} takes {copy_s:.3g} s, computing {costs.num_tokens} tokens again"
    return KvDecision(route=route, reason=f"{amounts} {recompute_s:.3g} s")
