"""To which replica a request goes: where it is expected to be finished first, and holds up others least.

What it takes there is: the prompts before it, its own prompt without the prefix whose KV cache is there already, the
wait for KV cache where too little is free, and its tokens at the pace of as many sequences as there will be.

By that alone, bursts go to replicas with few sequences and wait there for each other's prompts, so the time to the
first token counts several times; and a prompt holds up everybody at its replica, so that counts, too: once for each.
Of equals the replica with fewer requests, then the one with the lower number.

Pure: the daemon says what is at each replica, and the simulator what would be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from typing import Final, NamedTuple, Protocol

NEWEST: Final = 0.1  # the weight of the last request in the mean length of outputs, which is what is expected of one
# What a second before the first token counts for, in seconds after it. Simulated bursts (README) have most requests in
# time from 8 on, and more costs mean latency; targets, too, are some ten times as tight for the first token.
_FIRST: Final = 8.0


class Pace(Protocol):
    """How fast a replica is. ``planner.prediction.Pipeline`` is one."""

    def cycle_s(self, sequences: int) -> float:
        """Return the seconds in which so many sequences get a token each."""

    def prefill_s_per_token(self) -> float:
        """Return the seconds that a token of a prompt takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualPace:
    """Where nothing is known of any replica: a token of a prompt counts as a hundredth of a step."""

    def cycle_s(self, sequences: int) -> float:  # noqa: ARG002
        return 1.0

    def prefill_s_per_token(self) -> float:
        return 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request as a replica sees it.

    Attributes:
        context_tokens: Prompt and output so far, which are or will be in the KV cache.
        prefill_tokens: Of those, what is still to be computed before its next token; 0 once it decodes.
        output_tokens: How many more are expected.
    """

    context_tokens: int
    prefill_tokens: int
    output_tokens: float


class Load(Protocol):
    """What is at a replica already."""

    @property
    def requests(self) -> int: ...

    @property
    def prefill_tokens(self) -> float:
        """Of all prompts there, what is still to be computed."""

    @property
    def kv_tokens(self) -> float:
        """What all of them will have in the KV cache at their ends."""

    def steps_until_room(self, kv_tokens: float, *, capacity: float) -> float:
        """Return how many steps it takes until so much of a KV cache is free for one more that comes after them."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """A ``Load`` of requests that are known one by one."""

    jobs: Sequence[Job] = ()

    @property
    def requests(self) -> int:
        return len(self.jobs)

    @property
    def prefill_tokens(self) -> float:
        return sum(each.prefill_tokens for each in self.jobs)

    @property
    def kv_tokens(self) -> float:
        return sum(each.context_tokens + each.output_tokens for each in self.jobs)

    def steps_until_room(self, kv_tokens: float, *, capacity: float) -> float:
        """As ``Load``: those that do not fit at first begin as others end, in the order in which they came."""
        used, now = 0.0, 0.0
        ends: list[tuple[float, float]] = []  # step at which one ends, what it gives back
        for each in self.jobs:
            tokens = each.context_tokens + each.output_tokens
            while ends and used + tokens > capacity:
                now, freed = heappop(ends)
                used -= freed
            heappush(ends, (now + each.output_tokens, tokens))
            used += tokens
        while ends and used + kv_tokens > capacity:
            now, freed = heappop(ends)
            used -= freed
        return now


class Option(NamedTuple):
    """A replica that could take the request. A tuple, as ``Expected`` is.

    Attributes:
        load: What is there already.
        kv_capacity_tokens: None where it is not known: it counts as enough.
        cached_tokens: Of the request's first tokens, how many are in its KV cache.
        pace: None where nothing predicts it.
    """

    replica: int
    load: Load = Jobs()
    kv_capacity_tokens: int | None = None
    cached_tokens: int = 0
    pace: Pace | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The choice; ``finish_s``: how long until the request is expected to be finished there."""

    replica: int
    finish_s: float


class Expected(NamedTuple):
    """What is expected of a request at one replica, in seconds. A tuple, as the simulator makes millions.

    Attributes:
        first_s: Until its first token: the wait for KV cache, prompts before it, its own.
        rest_s: For all tokens of it.
        others_s: By how much its prompt holds up those that are there, all together.
        order: By which replicas are compared: all of these, then the requests there, then the replica's number.
    """

    first_s: float
    rest_s: float
    others_s: float
    order: tuple[float, int, int]

    @property
    def finish_s(self) -> float:
        return self.first_s + self.rest_s


def choose_replica(job: Job, options: Sequence[Option]) -> Route:
    """Return where ``job`` goes. Paces count only where all are known: a guess is not compared with a prediction.

    Raises:
        ValueError: There is no option.
    """
    if not options:
        raise ValueError("no replica to choose from")
    are_known = all(option.pace is not None for option in options)
    equal = EqualPace()
    best, least = options[0], expected(job, options[0], pace=options[0].pace if are_known else None)
    for option in options[1:]:
        there = _expected(job, option, (option.pace or equal) if are_known else equal, at_most=least.order[0])
        if there is not None and there.order < least.order:
            best, least = option, there
    return Route(replica=best.replica, finish_s=least.finish_s)


def expected(job: Job, option: Option, *, pace: Pace | None) -> Expected:
    """Return what is expected of ``job`` at this replica."""
    found = _expected(job, option, pace or EqualPace(), at_most=inf)
    assert found is not None, "nothing is beyond all bounds"
    return found


def _expected(job: Job, option: Option, pace: Pace, *, at_most: float) -> Expected | None:
    """Return what is expected; None as soon as it is clear that the first part of ``order`` is beyond ``at_most``."""
    load = option.load
    requests = load.requests
    cycle_s, prompt_s = pace.cycle_s(requests + 1), pace.prefill_s_per_token()
    own_s = max(0, job.prefill_tokens - option.cached_tokens) * prompt_s
    first_s = load.prefill_tokens * prompt_s + own_s
    rest_s, others_s = job.output_tokens * cycle_s, requests * own_s
    if _FIRST * first_s + rest_s + others_s > at_most:  # and a wait for KV cache only adds to it
        return None
    capacity = option.kv_capacity_tokens
    if capacity is not None:
        shared = min(option.cached_tokens, job.context_tokens)
        needed = job.context_tokens - shared + job.output_tokens
        if needed + load.kv_tokens > capacity:
            first_s += load.steps_until_room(needed, capacity=capacity) * cycle_s
    return Expected(first_s, rest_s, others_s, (_FIRST * first_s + rest_s + others_s, requests, option.replica))
