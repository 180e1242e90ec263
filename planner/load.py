"""What is known of the load, for the policy: ``LoadMonitor`` gathers, ``Observation`` is what it saw.

Pure: times come in, and whoever samples (the daemon, the simulator) tells what happened. A value that is missing or
stale is an ``Absence``, which the policy has to treat as such.
"""

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from planner.arrivals import Absence, Arrivals, ArrivalStatistics, Reading
from planner.guard import SinceChange
from planner.workload import Slo

T = TypeVar("T")
WINDOWS_S: Final = (30.0, 180.0, 1800.0)
_MOST_REMEMBERED: Final = 2048  # requests of which lengths and times are kept
_NO_TARGETS: Final = Slo()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSample:
    """What the engines said at one moment, all replicas together.

    Attributes:
        kv_use: Share of the KV cache in use, of the fullest replica.
        stage_busy: Share of the time that each stage computed; an ``Absence`` for one that does not say.
    """

    running: int
    waiting: int
    kv_use: Reading
    stage_busy: tuple[Reading, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The load as it was seen at one moment.

    Attributes:
        windows: Arrivals, the shortest window first.
        awaiting: Requests without their first token, by the monitor's own count.
        queue_age_s: Of the oldest request without its first token; 0 where there is none.
        since_change: Who came since the layout in force is there; None: it was there from the beginning.
        ttft_s, tpot_s: Means over the requests of the monitor's memory that came since then; ``ttft_p99_s`` likewise.
        late_share: Of the requests of the monitor's memory, how many missed a target; those count that still wait for
            longer than they should. Unsupported where there are no targets.
        running, queue_length, kv_use, stage_busy: As the engines said last.
        taken_bytes: Memory that others hold, by device, as it was seen last.
    """

    windows: tuple[ArrivalStatistics, ...]
    awaiting: int = 0
    running: Reading = Absence.NOT_YET
    queue_length: Reading = Absence.NOT_YET
    queue_age_s: Reading = Absence.NOT_YET
    since_change: SinceChange | None = None
    prompt_tokens_mean: Reading = Absence.NOT_YET
    output_tokens_mean: Reading = Absence.NOT_YET
    ttft_s: Reading = Absence.NOT_YET
    ttft_p99_s: Reading = Absence.NOT_YET
    tpot_s: Reading = Absence.NOT_YET
    late_share: Reading = Absence.UNSUPPORTED
    kv_use: Reading = Absence.NOT_YET
    stage_busy: tuple[Reading, ...] = ()
    taken_bytes: Mapping[str, int] | Absence = Absence.NOT_YET

    @property
    def is_quiet(self) -> bool:
        """Whether nobody is there, and nobody who came still counts: it stays like this until somebody comes."""
        there = (self.running, self.queue_length, float(self.awaiting))
        seen = (self.prompt_tokens_mean, self.output_tokens_mean, self.ttft_s, self.tpot_s)
        return (
            all(each == 0 for each in there)
            and all(window.arrivals == 0 for window in self.windows)
            and all(isinstance(each, Absence) for each in (*seen, self.late_share))
        )

    def window(self, window_s: float) -> ArrivalStatistics:
        """Return the window whose length is nearest to ``window_s``."""
        return min(self.windows, key=lambda each: abs(each.window_s - window_s))

    @property
    def latency_s(self) -> Reading:
        """Mean time from arrival to the last token, from its parts."""
        if isinstance(self.ttft_s, Absence):
            return self.ttft_s
        if isinstance(self.output_tokens_mean, Absence):
            return self.output_tokens_mean
        if self.output_tokens_mean <= 1:
            return self.ttft_s
        if isinstance(self.tpot_s, Absence):
            return self.tpot_s
        return self.ttft_s + (self.output_tokens_mean - 1) * self.tpot_s


class _Recent:
    """Values of the last ``window_s``, at most so many."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._values: deque[tuple[float, float]] = deque(maxlen=_MOST_REMEMBERED)
        self._had_any = False

    def add(self, at_s: float, value: float) -> None:
        self._values.append((at_s, value))
        self._had_any = True

    def forget(self) -> None:
        self._values.clear()

    def mean(self, now_s: float) -> Reading:
        values = self._now(now_s)
        return sum(values) / len(values) if values else self.absence

    def above(self, now_s: float, limit: float) -> tuple[int, int]:
        """Return how many of the values are above ``limit``, and how many there are."""
        values = self._now(now_s)
        return sum(value > limit for value in values), len(values)

    def percentile(self, now_s: float, share: float) -> Reading:
        values = sorted(self._now(now_s))
        return values[min(len(values) - 1, int(share * len(values)))] if values else self.absence

    @property
    def absence(self) -> Absence:
        """What a value is where there is none."""
        return Absence.STALE if self._had_any else Absence.NOT_YET

    def _now(self, now_s: float) -> Sequence[float]:
        while self._values and self._values[0][0] <= now_s - self._window_s:
            self._values.popleft()
        return [value for _at_s, value in self._values]


class LoadMonitor:
    """Gathers what happens, each thing told once and in the order of time.

    Args:
        windows_s: Of the arrivals.
        memory_s: Over which lengths and latencies are averaged.
        stale_after_s: Without a new sample for so long, what the engines said last is no longer believed; likewise what
            was seen of the devices.
        slo: The targets that requests should meet.
    """

    def __init__(
        self,
        *,
        began_s: float,
        windows_s: Sequence[float] = WINDOWS_S,
        memory_s: float = 60.0,
        stale_after_s: float = 15.0,
        slo: Slo = _NO_TARGETS,
    ) -> None:
        self.slo = slo
        self._arrivals = Arrivals(windows_s, began_s=began_s)
        self._stale_after_s = stale_after_s
        self._waiting: dict[Hashable, float] = {}  # without a first token, oldest first
        self._prompts, self._outputs = _Recent(max(windows_s)), _Recent(max(windows_s))
        self._ttfts, self._tpots = _Recent(memory_s), _Recent(memory_s)
        self._sample: tuple[float, EngineSample] | None = None
        self._taken: tuple[float, Mapping[str, int]] | None = None
        self._changed: SinceChange | None = None  # without those that came since, which are beside it
        self._came_s: list[float] = []

    def arrived(self, request: Hashable, now_s: float, *, prompt_tokens: int | None = None) -> None:
        """A request came; ``prompt_tokens`` may follow by ``prompt_known``."""
        self._arrivals.add(now_s)
        self._waiting[request] = now_s
        if self._changed is not None and len(self._came_s) < _MOST_REMEMBERED:
            self._came_s.append(now_s)
        if prompt_tokens is not None:
            self.prompt_known(now_s, prompt_tokens)

    def prompt_known(self, now_s: float, prompt_tokens: int) -> None:
        """The length of one prompt."""
        self._prompts.add(now_s, prompt_tokens)

    def first_token(self, request: Hashable, now_s: float) -> None:
        """A request got its first token. One that is unknown is none of ours; one that came to
        another layout says nothing of this one."""
        came_s = self._waiting.pop(request, None)
        if came_s is not None and (self._changed is None or came_s >= self._changed.at_s):
            self._ttfts.add(now_s, now_s - came_s)

    def ended(
        self, request: Hashable, now_s: float, *, output_tokens: int | None = None, tpot_s: float | None = None
    ) -> None:
        """A request ended, on any path; what was not measured of it is None."""
        self._waiting.pop(request, None)
        if output_tokens is not None:
            self._outputs.add(now_s, output_tokens)
        if tpot_s is not None:
            self._tpots.add(now_s, tpot_s)

    def sampled(self, now_s: float, sample: EngineSample) -> None:
        """The engines were asked."""
        self._sample = (now_s, sample)

    def devices_seen(self, now_s: float, taken_bytes: Mapping[str, int]) -> None:
        """The devices were looked at: so many bytes of each are held by others."""
        self._taken = (now_s, taken_bytes)

    def layout_changed(self, now_s: float) -> None:
        """Another layout is in force: latencies of requests that come from here on are its own."""
        self._ttfts.forget()
        self._tpots.forget()
        sample = self._believed(self._sample, now_s)
        there = 0.0 if isinstance(sample, Absence) else float(sample.running + sample.waiting)
        self._changed = SinceChange(at_s=now_s, inherited=max(there, float(len(self._waiting))))
        self._came_s = []

    def observe(self, now_s: float) -> Observation:
        """Return what is known at ``now_s``."""
        oldest_s = next(iter(self._waiting.values()), None)
        sample = self._believed(self._sample, now_s)
        return Observation(
            windows=self._arrivals.statistics(now_s),
            awaiting=len(self._waiting),
            running=sample if isinstance(sample, Absence) else float(sample.running),
            queue_length=sample if isinstance(sample, Absence) else float(sample.waiting),
            queue_age_s=0.0 if oldest_s is None else now_s - oldest_s,
            since_change=self._changed and replace(self._changed, came_s=tuple(self._came_s)),
            prompt_tokens_mean=self._prompts.mean(now_s),
            output_tokens_mean=self._outputs.mean(now_s),
            ttft_s=self._ttfts.mean(now_s),
            ttft_p99_s=self._ttfts.percentile(now_s, 0.99),
            tpot_s=self._tpots.mean(now_s),
            late_share=self._late_share(now_s),
            kv_use=sample if isinstance(sample, Absence) else sample.kv_use,
            stage_busy=() if isinstance(sample, Absence) else sample.stage_busy,
            taken_bytes=self._believed(self._taken, now_s),
        )

    def _late_share(self, now_s: float) -> Reading:
        """Return the share of the target that is missed more often: a request that misses both is late once."""
        shares = []
        if self.slo.ttft_s is not None:
            late, seen = self._ttfts.above(now_s, self.slo.ttft_s)
            overdue = 0
            for came_s in self._waiting.values():  # the oldest first
                if now_s - came_s <= self.slo.ttft_s:
                    break
                overdue += 1
            shares.append((late + overdue, seen + overdue))
        if self.slo.tpot_s is not None:
            shares.append(self._tpots.above(now_s, self.slo.tpot_s))
        if not shares:
            return Absence.UNSUPPORTED
        had_any = Absence.STALE in (self._ttfts.absence, self._tpots.absence)
        absence = Absence.STALE if had_any else Absence.NOT_YET
        return max((late / seen for late, seen in shares if seen), default=absence)

    def _believed(self, told: tuple[float, T] | None, now_s: float) -> T | Absence:
        """Return what was told last, unless that is too long ago."""
        if told is None:
            return Absence.NOT_YET
        at_s, value = told
        return Absence.STALE if now_s - at_s > self._stale_after_s else value
