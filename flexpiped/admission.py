"""How much work may be in flight: of all together, and of each API key.

What does not fit waits in a bounded line, by priority, until its deadline; what cannot wait is refused at once, with a
reason and when to come back. A place is held first, then tokens, once their number is known.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from flexpiped.keys import ANYBODY, Client
from flexpiped.settings import AdmissionSettings
from flexpiped.waiting import WaitingLine

_RATE_WINDOW_S = 30.0
_DEFAULT_RETRY_S = 1
_MAX_RETRY_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """A request counts as prompt and ``max_tokens`` together. One alone is always admitted, however large."""

    max_requests_in_flight: int = 256
    max_tokens_in_flight: int = 1_000_000
    max_requests_queued: int = 0
    queue_deadline_s: float = 30.0


def limits_of(settings: AdmissionSettings) -> AdmissionLimits:
    """Return the limits that a configuration says."""
    return AdmissionLimits(
        max_requests_in_flight=settings.max_requests_in_flight,
        max_tokens_in_flight=settings.max_tokens_in_flight,
        max_requests_queued=settings.max_requests_queued,
        queue_deadline_s=settings.queue_deadline_s,
    )


class OverloadReason(Enum):
    """Machine-readable: the ``code`` of the answer."""

    TOO_MANY_REQUESTS = "too_many_requests_in_flight"
    TOO_MANY_TOKENS = "token_budget_exhausted"
    KEY_CONCURRENCY = "key_concurrency_exceeded"
    KEY_RATE = "key_rate_exceeded"
    QUEUE_TIMEOUT = "queue_deadline_exceeded"  # waited as long as anybody may
    DEADLINE = "deadline_exceeded"  # waited as long as its client allowed


class Overloaded(Exception):
    """The request does not fit now. ``retry_after_s`` is when it may, from the rate at which work ends."""

    def __init__(self, message: str, *, reason: OverloadReason, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Lease:
    """One admitted request; ``tokens`` is what it has reserved so far, ``deadline_s`` until when it may wait."""

    client: Client = ANYBODY
    deadline_s: float = math.inf  # by the clock of the event loop, as the client says
    tokens: int = 0


@dataclass(slots=True)
class _Share:
    """What one key has in flight, and how many requests it may still begin (a bucket that fills by its rate)."""

    in_flight: int = 0
    allowance: float = 0.0
    filled_s: float = field(default=-math.inf)


class Releases:
    """How fast work has ended lately."""

    def __init__(self, *, clock: Callable[[], float], window_s: float = _RATE_WINDOW_S) -> None:
        self._clock = clock
        self._window_s = window_s
        self._ended: deque[tuple[float, int]] = deque()  # time, tokens

    def add(self, tokens: int) -> None:
        self._ended.append((self._clock(), tokens))
        self._forget()

    def seconds_until(self, *, requests: int = 0, tokens: int = 0) -> int:
        """Estimate when so much more will have ended: at least 1 s, at most a minute; 1 s when nothing is known."""
        self._forget()
        ended_tokens = sum(tokens for _time, tokens in self._ended)
        needed = max(
            requests / len(self._ended) if self._ended else 0.0, tokens / ended_tokens if ended_tokens else 0.0
        )
        return min(max(math.ceil(needed * self._window_s), _DEFAULT_RETRY_S), _MAX_RETRY_S)

    def _forget(self) -> None:
        oldest_s = self._clock() - self._window_s
        while self._ended and self._ended[0][0] <= oldest_s:
            self._ended.popleft()


class Admission:
    """Counts what is in flight. Used on one event loop; the scope of a lease gives everything back on every path."""

    def __init__(self, *, limits: AdmissionLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._releases = Releases(clock=clock)
        self._requests = 0
        self._tokens = 0
        self._shares: dict[str, _Share] = {}
        self._for_place = WaitingLine(fits=self._place_fits, take=self._take_places)
        self._for_tokens = WaitingLine(fits=self._tokens_fit, take=self._take_tokens)

    @property
    def limits(self) -> AdmissionLimits:
        return self._limits

    @limits.setter
    def limits(self, limits: AdmissionLimits) -> None:
        """Use other limits from now on; nothing that has been admitted is taken back."""
        self._limits = limits
        self._advance()

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    @property
    def tokens_in_flight(self) -> int:
        return self._tokens

    @property
    def requests_queued(self) -> int:
        return len(self._for_place) + len(self._for_tokens)

    def in_flight_of(self, client: Client) -> int:
        """Return how many requests of a key are in flight or wait."""
        share = self._shares.get(client.name)
        return 0 if share is None else share.in_flight

    def admit(self, client: Client = ANYBODY, *, deadline_s: float = math.inf) -> "Place":
        """Return a place for one request, taken on entering; its tokens are reserved once they are known.

        Args:
            deadline_s: Until when it may wait, by the clock of the event loop.
        """
        return Place(self, Lease(client=client, deadline_s=deadline_s))

    async def take(self, lease: Lease) -> None:
        """Take a place, which ``give_back`` ends.

        Raises:
            Overloaded
        """
        share = self._enter(lease.client)
        try:
            await self._wait_in(self._for_place, 1, lease, self._too_many_requests)
        except BaseException:
            share.in_flight -= 1
            raise

    def give_back(self, lease: Lease) -> None:
        """Give a place back, and what tokens it has."""
        self._shares[lease.client.name].in_flight -= 1
        self._requests -= 1
        self._tokens -= lease.tokens
        if lease.tokens:
            self._releases.add(lease.tokens)
        self._advance()

    async def reserve(self, lease: Lease, *, tokens: int) -> None:
        """Reserve ``tokens`` for an admitted request.

        Raises:
            Overloaded: Others hold so many that these do not fit.
        """
        await self._wait_in(self._for_tokens, tokens, lease, lambda: self._too_many_tokens(tokens))
        lease.tokens += tokens

    def _enter(self, client: Client) -> _Share:
        """Count a request for its key.

        Raises:
            Overloaded: The key has as many requests in flight as it may, or has begun as many as it may.
        """
        share = self._shares.setdefault(client.name, _Share())
        limit = client.max_requests_in_flight
        if limit is not None and share.in_flight >= limit:
            raise Overloaded(
                f"requests of this key in flight: {share.in_flight}, and at most {limit} may be",
                reason=OverloadReason.KEY_CONCURRENCY,
                retry_after_s=self._releases.seconds_until(requests=1),
            )
        self._spend(share, client)
        share.in_flight += 1
        return share

    def _spend(self, share: _Share, client: Client) -> None:
        """Take one from the bucket of a key: it holds a minute's worth and fills by the rate."""
        rate = client.requests_per_minute
        if rate is None:
            return
        now_s = self._clock()
        size = max(rate, 1.0)
        share.allowance = min(size, share.allowance + (now_s - share.filled_s) * rate / 60.0)
        share.filled_s = now_s
        if share.allowance < 1.0:
            raise Overloaded(
                f"this key may begin {rate:g} requests a minute",
                reason=OverloadReason.KEY_RATE,
                retry_after_s=math.ceil((1.0 - share.allowance) * 60.0 / rate),
            )
        share.allowance -= 1.0

    async def _wait_in(self, line: WaitingLine, amount: int, lease: Lease, refusal: Callable[[], Overloaded]) -> None:
        """Take an amount at once, or wait for it.

        Raises:
            Overloaded: The line is full, or the deadline has come.
        """
        priority = lease.client.priority
        if line.go_now(amount, priority=priority):  # nearly all do: without a timer and a place in the line
            return
        if self.requests_queued >= self._limits.max_requests_queued:
            raise refusal()
        now_s = asyncio.get_running_loop().time()
        last_s = now_s + self._limits.queue_deadline_s
        try:
            async with asyncio.timeout_at(min(last_s, lease.deadline_s)):
                await line.wait(amount, priority=priority)
        except TimeoutError:
            own = lease.deadline_s <= last_s
            raise Overloaded(
                f"waited {asyncio.get_running_loop().time() - now_s:.1f} s for others to finish",
                reason=OverloadReason.DEADLINE if own else OverloadReason.QUEUE_TIMEOUT,
                retry_after_s=self._releases.seconds_until(requests=1),
            ) from None

    def _too_many_requests(self) -> Overloaded:
        return Overloaded(
            f"requests in flight: {self._requests}, and at most {self._limits.max_requests_in_flight} may be",
            reason=OverloadReason.TOO_MANY_REQUESTS,
            retry_after_s=self._releases.seconds_until(requests=1),
        )

    def _too_many_tokens(self, tokens: int) -> Overloaded:
        limit = self._limits.max_tokens_in_flight
        return Overloaded(
            f"{self._tokens} tokens are reserved, {tokens} more would exceed {limit}",
            reason=OverloadReason.TOO_MANY_TOKENS,
            retry_after_s=self._releases.seconds_until(tokens=min(self._tokens + tokens - limit, self._tokens)),
        )

    def _place_fits(self, count: int) -> bool:
        return self._requests + count <= self._limits.max_requests_in_flight

    def _tokens_fit(self, tokens: int) -> bool:
        """One alone always fits."""
        return self._tokens == 0 or self._tokens + tokens <= self._limits.max_tokens_in_flight

    def _take_places(self, count: int) -> None:
        self._requests += count

    def _take_tokens(self, tokens: int) -> None:
        self._tokens += tokens

    def _advance(self) -> None:
        self._for_place.advance()
        self._for_tokens.advance()


class Place:
    """A place in admission while the scope lasts. Raises: Overloaded."""

    __slots__ = ("_admission", "_lease")

    def __init__(self, admission: Admission, lease: Lease) -> None:
        self._admission = admission
        self._lease = lease

    async def __aenter__(self) -> Lease:
        await self._admission.take(self._lease)
        return self._lease

    async def __aexit__(self, *_: object) -> None:
        self._admission.give_back(self._lease)
