"""Carries the KV cache of one request after the other to another instance, or says that it is computed again there.

    decide --copy--> written by the first --> accepted by the second --> loaded when the request comes
       |                    | failed                 | failed
       +--recompute---------+------------------------+--> the second computes the request's tokens again

The request runs on at the first meanwhile: what it gains until it is taken off, the second computes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from engines.errors import EngineError
from engines.offers import KvParcel, KvTransfers
from engines.protocol import Engine, EngineCapabilities
from planner.kv_route import KvMeasured, KvPreference, KvRoute, decide_kv_route


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """How a request's KV cache goes over, and why so. ``parcel`` None: it is computed again."""

    reason: str
    num_tokens: int
    parcel: KvParcel | None = None
    took_s: float = 0.0


class KvCarrier:
    """Decides for each request of one handover, by what the ones before took.

    Args:
        kv_bytes_per_token: Of the whole model.
    """

    def __init__(
        self,
        *,
        kv_bytes_per_token: int = 0,
        preference: KvPreference = KvPreference.AUTO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kv_bytes_per_token = kv_bytes_per_token
        self._preference = preference
        self._clock = clock
        self._measured = KvMeasured()

    @property
    def can_look_ahead(self) -> bool:
        """Whether the next request's way depends on none that is under way: they measure both ways first."""
        return self._preference is not KvPreference.AUTO or self._measured.is_complete

    async def carry(self, request_id: str, *, num_tokens: int, first: Engine, second: Engine) -> Carried:
        """Bring the KV cache of a request that runs at ``first`` to ``second``, if that is the way for it."""
        costs = self._measured.costs(num_tokens=num_tokens, kv_bytes_per_token=self._kv_bytes_per_token)
        refusal = copy_refusal(first.capabilities, second.capabilities)
        decision = decide_kv_route(costs, refusal=refusal, preference=self._preference)
        computed_again = Carried(reason=decision.reason, num_tokens=num_tokens)
        if decision.route is KvRoute.RECOMPUTE:
            return computed_again
        if not isinstance(first, KvTransfers) or not isinstance(second, KvTransfers):
            raise TypeError("an engine with a kv_form is a KvTransfers")
        began_s = self._clock()
        try:
            parcel = await first.export_kv(request_id)
        except EngineError as error:
            return Carried(reason=f"its KV cache could not be copied: {error}", num_tokens=num_tokens)
        try:
            await second.accept_kv(parcel)
        except EngineError as error:
            await first.forget_kv(parcel)
            return Carried(reason=f"its KV cache could not be loaded: {error}", num_tokens=num_tokens)
        except BaseException:
            await first.forget_kv(parcel)
            raise
        return Carried(reason=decision.reason, num_tokens=num_tokens, parcel=parcel, took_s=self._clock() - began_s)

    def measured(self, carried: Carried, *, waited_s: float) -> None:
        """The request has its next token, ``waited_s`` after it began to leave the first instance."""
        if carried.parcel is None:
            self._measured = self._measured.with_recompute(num_tokens=carried.num_tokens, took_s=waited_s)
        else:
            self._measured = self._measured.with_copy(
                num_bytes=carried.parcel.num_bytes, took_s=carried.took_s, waited_s=waited_s
            )

    async def drop(self, carried: Carried, *, first: Engine, second: Engine) -> None:
        """Have both instances let go of what was carried: it has been loaded, or will not be."""
        if carried.parcel is None:
            return
        for engine in (second, first):  # who wrote it removes it, last
            if isinstance(engine, KvTransfers):
                await engine.forget_kv(carried.parcel)


def copy_refusal(first: EngineCapabilities, second: EngineCapabilities) -> str:
    """Say why no KV cache can be copied from one instance to the other; empty when it can."""
    for capabilities in (first, second):
        if not capabilities.kv_form:
            return capabilities.kv_refusal or f"the {capabilities.name} engine does not hand its KV cache over"
    if first.kv_form != second.kv_form:
        return f"the KV caches differ: {first.kv_form} here, {second.kv_form} there"
    return ""
