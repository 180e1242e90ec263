"""What is at a simulated replica, as routing sees it."""

from dataclasses import dataclass

from planner.simulation.replica import Replica


@dataclass(slots=True)
class Expectation:
    """How many tokens more are expected of each request; one for all replicas, and it changes."""

    output_tokens: float


class Standing:
    """What is at a replica whenever it is asked, as a ``planner.routing.Load``: all requests are taken to be alike.

    Which of them is how far is not looked at: they are taken to end evenly, a whole KV cache of them in as many
    steps as a request has.
    """

    __slots__ = ("_expected", "_replica")

    def __init__(self, replica: Replica, expected: Expectation) -> None:
        self._replica = replica
        self._expected = expected

    @property
    def requests(self) -> int:
        return self._replica.live

    @property
    def prefill_tokens(self) -> float:
        return self._replica.ahead_tokens

    @property
    def kv_tokens(self) -> float:
        replica = self._replica
        return replica.kv_used_tokens + replica.waiting_tokens + replica.live * self._expected.output_tokens

    def steps_until_room(self, kv_tokens: float, *, capacity: float) -> float:
        missing = self.kv_tokens + kv_tokens - capacity
        return self._expected.output_tokens * missing / max(1.0, capacity) if self.requests and missing > 0 else 0.0
