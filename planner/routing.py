"""To which replica a request goes: where it is expected to be finished first.

What it takes there is: the prompts before it, its own prompt without the prefix whose KV cache is there already, the
wait for KV cache where too little is free, and its tokens at the pace of as many sequences as there will be. Of equals
the replica with fewer requests, then the one with the lower number.

Pure: the daemon says what is at each replica, and the simulator what would be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

NEWEST: Final = 0.1  # the weight of the last request in the mean length of outputs, which is what is expected of one


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

    def steps_until_free(self, kv_tokens: float) -> float:
        """Return how many steps it takes until so much of that is given back by those that end."""


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

    def steps_until_free(self, kv_tokens: float) -> float:
        """As ``Load``. One that fits a replica at all never waits as long as the longest of those that are there."""
        steps = 0.0
        for each in sorted(self.jobs, key=lambda each: each.output_tokens):
            if kv_tokens <= 0:
                break
            kv_tokens -= each.context_tokens + each.output_tokens
            steps = each.output_tokens
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A replica that could take the request.

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


def choose_replica(job: Job, options: Sequence[Option]) -> Route:
    """Return where ``job`` goes. Paces count only where all are known: a guess is not compared with a prediction.

    Raises:
        ValueError: There is no option.
    """
    if not options:
        raise ValueError("no replica to choose from")
    are_known = all(option.pace is not None for option in options)
    found = [(expected_finish_s(job, option, pace=option.pace if are_known else None), option) for option in options]
    finish_s, best = min(found, key=lambda each: (each[0], each[1].load.requests, each[1].replica))
    return Route(replica=best.replica, finish_s=finish_s)


def expected_finish_s(job: Job, option: Option, *, pace: Pace | None) -> float:
    """Return in how many seconds ``job`` would be finished at this replica."""
    pace = pace or EqualPace()
    cycle_s = pace.cycle_s(option.load.requests + 1)
    own_tokens = max(0, job.prefill_tokens - option.cached_tokens)
    tokens = option.load.prefill_tokens + own_tokens
    wait_s = _steps_until_room(job, option) * cycle_s
    return wait_s + tokens * pace.prefill_s_per_token() + job.output_tokens * cycle_s


def _steps_until_room(job: Job, option: Option) -> float:
    """Return how many steps it takes until enough requests have ended for the KV cache of this one; 0: it has room."""
    if option.kv_capacity_tokens is None:
        return 0.0
    shared = min(option.cached_tokens, job.context_tokens)
    missing = job.context_tokens - shared + job.output_tokens + option.load.kv_tokens - option.kv_capacity_tokens
    return option.load.steps_until_free(missing) if missing > 0 else 0.0
