"""One replica: a pipeline that batches continuously. Its rounds are the events, many at once while nothing changes.

A round is one micro-batch: a share of the decoding sequences gets a token each, and prompts fill up its token budget.
With ``g`` micro-batches in flight a sequence gets a token every ``g`` rounds. A round follows the one before after what
the slowest stage takes, or after a ``g``-th of what a micro-batch needs through all stages, whichever is more.

How far all decoding sequences have come is one number, ``_progress`` (tokens of a sequence that decoded from the
start), so that a round costs the same for any number of them: a sequence that joins at ``p`` ends at ``p + tokens``.
Admission, preemption of the youngest and the order of prompts are those of the native engine's scheduler.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import ceil, inf

from planner.simulation.clock import Clock
from planner.simulation.step_times import NOTHING, StepTime, StepTimes

_DRIFT = 0.05  # of the context, after which a round is priced anew
_TINY = 1e-9


@dataclass(slots=True, kw_only=True, eq=False)
class SimulatedRequest:
    """One request, and what became of it. Times in seconds; ``inf``: not yet."""

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float = inf
    end_s: float = inf
    preemptions: int = 0
    done_tokens: int = 0  # given before a preemption
    left_tokens: int = 0  # of the prompt, to be computed
    joined: float = field(default=0.0)  # progress of the replica when it began to decode
    order: int = 0
    is_decoding: bool = False

    @property
    def context_tokens(self) -> int:
        """What must be in the KV cache before the next token."""
        return self.prompt_tokens + self.done_tokens


class Replica:
    """A pipeline that serves requests until it is drained. ``name`` is for people."""

    def __init__(
        self,
        clock: Clock,
        steps: StepTimes,
        *,
        name: str,
        on_end: Callable[[SimulatedRequest], None],
        on_first: Callable[[SimulatedRequest], None] = lambda _request: None,
        block_tokens: int = 16,
    ) -> None:
        self.name = name
        self.steps = steps
        self.busy_s = 0.0
        self.rounds = 0.0
        self.paused_until_s = 0.0
        self._clock = clock
        self._on_end = on_end
        self._on_first = on_first
        self._block_tokens = block_tokens
        self._waiting: deque[SimulatedRequest] = deque()
        self._prompts: deque[SimulatedRequest] = deque()
        self._ends: list[tuple[float, int, SimulatedRequest]] = []
        self._running: list[SimulatedRequest] = []  # in order of admission; those that ended are dropped lazily
        self._num_decoding = 0
        self._progress = 0.0
        self._kv_base = 0.0  # with the progress of those who decode: tokens in the KV cache
        self._prompt_kv = 0  # reserved by prompts that are not through
        self.waiting_tokens = 0  # of those who wait: what they will have in the KV cache before the next token
        self.ahead_tokens = 0  # tokens of prompts that are still to be computed, of those who wait too
        self._orders = 0
        self._bulk: tuple[float, float, float, float] | None = None  # began, seconds a round, rounds, tokens a round
        self._busy_each_s = 0.0
        self._version = 0

    # --- what others may ask ---

    @property
    def live(self) -> int:
        return len(self._waiting) + len(self._prompts) + self._num_decoding

    @property
    def waiting(self) -> int:
        """Requests without their first token, those whose prompt is under way included."""
        return len(self._waiting) + len(self._prompts)

    @property
    def running(self) -> int:
        return len(self._prompts) + self._num_decoding

    @property
    def kv_used_tokens(self) -> float:
        return self._kv_base + self._num_decoding * self._progress + self._prompt_kv

    @property
    def kv_use(self) -> float:
        return self.kv_used_tokens / max(1, self.steps.times.kv_capacity_tokens)

    # --- what happens to it ---

    def submit(self, request: SimulatedRequest) -> None:
        """Queue a request."""
        request.left_tokens = request.context_tokens
        self.ahead_tokens += request.left_tokens
        self.waiting_tokens += request.context_tokens
        self._waiting.append(request)
        self._wake()

    def change(self, steps: StepTimes, *, pause_s: float) -> None:
        """Go on with another layout after a pause; whoever finds no room in its KV cache is computed again."""
        self._settle()
        self.steps = steps
        self.paused_until_s = max(self.paused_until_s, self._clock.now_s) + pause_s
        self._wake()

    def take_all(self) -> list[SimulatedRequest]:
        """Give up all requests, oldest first: they are computed again elsewhere from the tokens that they have."""
        self._settle()
        while self._num_decoding or self._prompts:
            self._preempt_youngest()
        taken = list(self._waiting)
        self._waiting.clear()
        self.ahead_tokens = self.waiting_tokens = 0
        self._version += 1
        return taken

    # --- rounds ---

    def _wake(self) -> None:
        """Look at the queue at the end of the round under way, now where there is none."""
        if self._bulk is None:
            self._version += 1
            version = self._version
            self._clock.at(max(self._clock.now_s, self.paused_until_s), lambda: self._go_on(version))
            return
        began_s, each_s, rounds, per_round = self._bulk
        passed = max(1, ceil((self._clock.now_s - began_s) / each_s - _TINY))
        if passed < rounds:  # break off what was to go on
            self._bulk = (began_s, each_s, float(passed), per_round)
            self._version += 1
            version = self._version
            self._clock.at(began_s + passed * each_s, lambda: self._go_on(version))

    def _go_on(self, version: int) -> None:
        if version != self._version:
            return
        if self._clock.now_s < self.paused_until_s:
            self._clock.at(self.paused_until_s, lambda: self._go_on(version))
            return
        self._settle()
        self._end_those_done()
        self._admit()
        if self._num_decoding or self._prompts:
            self._begin_rounds()

    def _settle(self) -> None:
        """Take in the rounds that have passed."""
        if self._bulk is None:
            return
        began_s, each_s, rounds, per_round = self._bulk
        self._bulk = None
        passed = min(rounds, (self._clock.now_s - began_s) / each_s)
        self._progress += passed * per_round
        self.busy_s += passed * self._busy_each_s
        self.rounds += passed

    def _end_those_done(self) -> None:
        ends = self._ends
        while ends and ends[0][0] <= self._progress + 1e-6:
            _, order, request = heappop(ends)
            if not request.is_decoding or request.order != order:  # preempted meanwhile
                continue
            self._stop_decoding(request)
            request.end_s = max(self._clock.now_s, request.first_token_s)
            request.done_tokens = request.output_tokens
            self._on_end(request)

    def _stop_decoding(self, request: SimulatedRequest) -> None:
        request.is_decoding = False
        self._num_decoding -= 1
        self._kv_base -= request.context_tokens - request.joined
        if not self._num_decoding:
            self._kv_base = 0.0

    def _admit(self) -> None:
        times, waiting = self.steps.times, self._waiting
        while self.kv_used_tokens > times.kv_capacity_tokens and self.running > 1:
            self._preempt_youngest()
        while waiting and self.running < times.max_sequences:
            needed = waiting[0].context_tokens
            headroom = self._block_tokens * self.running
            if self.running and self.kv_used_tokens + needed + headroom > times.kv_capacity_tokens:
                return
            request = waiting.popleft()
            self.waiting_tokens -= needed
            self._orders += 1
            request.order, request.left_tokens = self._orders, needed
            self._prompts.append(request)
            self._running.append(request)
            self._prompt_kv += needed

    def _preempt_youngest(self) -> None:
        while True:
            request = self._running.pop()
            if request.is_decoding or request in self._prompts:
                break
        if request.is_decoding:
            made = int(self._progress - request.joined + _TINY)
            self._stop_decoding(request)
            request.done_tokens += min(made, request.output_tokens - request.done_tokens - 1)
        else:
            self._prompts.remove(request)
            self._prompt_kv -= request.context_tokens
            self.ahead_tokens -= request.left_tokens
        request.preemptions += 1
        request.left_tokens = request.context_tokens
        self.ahead_tokens += request.left_tokens
        self.waiting_tokens += request.context_tokens
        self._waiting.appendleft(request)

    def _begin_rounds(self) -> None:
        chunk, through = self._take_chunk()
        each_s, passing_s, groups, busy_s = self._round_s(chunk)
        now_s = self._clock.now_s
        for request in through:
            self._begin_decoding(request, first_s=now_s + passing_s)
        rounds = 1.0 if chunk is not NOTHING or self._prompts else self._rounds_alike(groups)
        self._busy_each_s = busy_s
        self._bulk = (now_s, each_s, rounds, 1 / groups)
        self._version += 1
        version = self._version
        self._clock.at(now_s + rounds * each_s, lambda: self._go_on(version))

    def _take_chunk(self) -> tuple[StepTime, list[SimulatedRequest]]:
        """Return what the prompts of this round add, and who is through with its prompt."""
        if not self._prompts:
            return NOTHING, []
        limits = self.steps.times
        groups = self._groups()
        budget = max(1, limits.max_step_tokens - self._num_decoding // groups)
        places = max(1, ceil((self.running + len(self._waiting)) / groups) - self._num_decoding // groups)
        tokens = context = count = 0
        through: list[SimulatedRequest] = []
        while self._prompts and budget > tokens and count < places:
            request = self._prompts[0]
            part = min(request.left_tokens, budget - tokens)
            request.left_tokens -= part
            self.ahead_tokens -= part
            tokens += part
            count += 1
            context += request.context_tokens - request.left_tokens
            if request.left_tokens:
                break
            through.append(self._prompts.popleft())
        return self.steps.chunk(tokens, count, context, beside=groups > 1), through

    def _groups(self) -> int:
        return max(1, min(self.steps.micro_batches, self.running))

    def _round_s(self, chunk: StepTime) -> tuple[float, float, int, float]:
        """Return the seconds of a round, through all stages, the micro-batches in flight, and what stages compute."""
        groups = self._groups()
        beside = groups > 1
        if self._num_decoding:
            context = (self.kv_used_tokens - self._prompt_kv) / self._num_decoding
            own = self.steps.decode(ceil(self._num_decoding / groups), context, beside=beside)
        else:
            own = self.steps.token(beside=beside)
        passing_s = own.passing_s + chunk.passing_s
        each_s = max(own.slowest_s + chunk.slowest_s, passing_s / groups, _TINY)
        return each_s, passing_s, groups, own.busy_s + chunk.busy_s

    def _rounds_alike(self, groups: int) -> float:
        """Return how many rounds pass before anything changes by itself: an end, a full KV cache, a longer context."""
        until = self._ends[0][0] - self._progress if self._ends else inf
        context = self.kv_used_tokens / self._num_decoding
        room = (self.steps.times.kv_capacity_tokens - self.kv_used_tokens) / self._num_decoding
        cycles = min(until, max(1.0, context * _DRIFT), max(1.0, room))
        return max(1.0, ceil(cycles * groups - 1e-6))

    def _begin_decoding(self, request: SimulatedRequest, *, first_s: float) -> None:
        if request.first_token_s == inf:
            request.first_token_s = first_s
            self._on_first(request)
        self._prompt_kv -= request.context_tokens
        request.joined = self._progress
        request.is_decoding = True
        self._num_decoding += 1
        self._kv_base += request.context_tokens - request.joined
        left = request.output_tokens - request.done_tokens
        heappush(self._ends, (self._progress + left, request.order, request))
