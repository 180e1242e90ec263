"""How much work may be in flight. What does not fit is refused at once, with a reason and when to come back."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

_RATE_WINDOW_S = 30.0
_DEFAULT_RETRY_S = 1
_MAX_RETRY_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """A request counts as prompt and ``max_tokens`` together. One alone is always admitted, however large."""

    max_requests_in_flight: int = 256
    max_tokens_in_flight: int = 1_000_000


class OverloadReason(Enum):
    """Machine-readable: the ``code`` of the answer."""

    TOO_MANY_REQUESTS = "too_many_requests_in_flight"
    TOO_MANY_TOKENS = "token_budget_exhausted"


class Overloaded(Exception):
    """The request does not fit now. ``retry_after_s`` is when it may, from the rate at which work ends."""

    def __init__(self, message: str, *, reason: OverloadReason, retry_after_s: int) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class Lease:
    """One admitted request; ``tokens`` is what it has reserved so far."""

    tokens: int = 0


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
        self.limits = limits
        self._releases = Releases(clock=clock)
        self._requests = 0
        self._tokens = 0

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    @property
    def tokens_in_flight(self) -> int:
        return self._tokens

    @contextmanager
    def admit(self) -> Iterator[Lease]:
        """Take a place for one request; its tokens are reserved once they are known.

        Raises:
            Overloaded
        """
        if self._requests >= self.limits.max_requests_in_flight:
            raise Overloaded(
                f"{self._requests} requests are in flight, and at most {self.limits.max_requests_in_flight} may be",
                reason=OverloadReason.TOO_MANY_REQUESTS,
                retry_after_s=self._releases.seconds_until(requests=1),
            )
        self._requests += 1
        lease = Lease()
        try:
            yield lease
        finally:
            self._requests -= 1
            self._tokens -= lease.tokens
            if lease.tokens:
                self._releases.add(lease.tokens)

    def reserve(self, lease: Lease, *, tokens: int) -> None:
        """Reserve ``tokens`` for an admitted request.

        Raises:
            Overloaded: Others hold so many that these do not fit.
        """
        excess = self._tokens + tokens - self.limits.max_tokens_in_flight
        if self._tokens > 0 and excess > 0:
            raise Overloaded(
                f"{self._tokens} tokens are reserved, {tokens} more would exceed {self.limits.max_tokens_in_flight}",
                reason=OverloadReason.TOO_MANY_TOKENS,
                retry_after_s=self._releases.seconds_until(tokens=min(excess, self._tokens)),
            )
        lease.tokens += tokens
        self._tokens += tokens
