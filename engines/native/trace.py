"""When steps were dispatched and ended, and what each stage computed: for profiles, benchmarks, and the commit pause.

Bounded: what nobody takes is forgotten.
"""

from collections import deque

import numpy as np

_KEPT = 200_000
_STAGE_STEPS_KEPT = 512


class StepTrace:
    """Times are seconds of the core's monotonic clock."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=_KEPT)
        self._dispatches: deque[float] = deque(maxlen=_KEPT)
        self.last_end_s = 0.0
        self.first_dispatch_s: dict[int, float] = {}  # by epoch

    def ended(self, now_s: float, epoch: int) -> None:
        self._ends.append((now_s, epoch))
        self.last_end_s = now_s

    def dispatched(self, now_s: float, epoch: int) -> None:
        self._dispatches.append(now_s)
        if epoch not in self.first_dispatch_s:
            self.first_dispatch_s[epoch] = now_s

    def take(self) -> tuple[list[float], list[int], list[float]]:
        """Return ends, their epochs, and dispatches, and forget them."""
        ends, dispatches = list(self._ends), list(self._dispatches)
        self._ends.clear()
        self._dispatches.clear()
        return [t for t, _ in ends], [e for _, e in ends], dispatches


class StageTrace:
    """What one stage computed in its last steps, and for how long. Nothing is worked out before it is asked for."""

    def __init__(self) -> None:
        self._steps: deque[tuple[bytes, bytes, float]] = deque(maxlen=_STAGE_STEPS_KEPT)
        self._busy_s = self._sampling_s = 0.0

    def computed(self, starts: bytes, counts: bytes, busy_s: float) -> None:
        """Note a step: ``starts`` and ``counts`` of its sequences as in ``RunStep``."""
        self._steps.append((starts, counts, busy_s))
        self._busy_s += busy_s

    def sampled(self, seconds: float) -> None:
        """Note what the head and the choice of tokens took of a step."""
        self._sampling_s += seconds

    def parts_s(self) -> dict[str, float]:
        """Return what the time of all steps since the last call went to; ``all`` is the whole of it."""
        parts = {"all": self._busy_s, "head and sampling": self._sampling_s}
        self._busy_s = self._sampling_s = 0.0
        return parts

    def take(self) -> tuple[list[int], list[int], list[int], list[float]]:
        """Return tokens, sequences, context (of all sequences, after the step) and seconds; forget them."""
        steps, self._steps = self._steps, deque(maxlen=_STAGE_STEPS_KEPT)
        sizes = [np.frombuffer(counts, dtype=np.int32) for _, counts, _ in steps]
        before = [int(np.frombuffer(starts, dtype=np.int32).sum()) for starts, _, _ in steps]
        tokens = [int(counts.sum()) for counts in sizes]
        return (
            tokens,
            [len(counts) for counts in sizes],
            [start + count for start, count in zip(before, tokens, strict=True)],
            [busy_s for _, _, busy_s in steps],
        )
