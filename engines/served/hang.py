"""Is an engine hung? Pure: fed with what is seen of it about once a second."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What has been seen. Progress is a token that came, a step that ended, or a sign of loading or compiling."""

    deadline_s: float  # without progress while work is pending
    patience_s: float  # the same after the engine said that it loads or compiles
    steps_total: int = -1
    progress_s: float = 0.0
    pending: bool = False
    slow_work: bool = False

    def progressed(self, *, now_s: float) -> "Pulse":
        """A token came."""
        return replace(self, progress_s=now_s, slow_work=False)

    def working_slowly(self, *, now_s: float) -> "Pulse":
        """The engine said that it loads or compiles."""
        return replace(self, progress_s=now_s, slow_work=True)

    def seen(self, *, pending: bool, steps_total: int | None, now_s: float) -> "Pulse":
        """Take in a look at the engine: is work pending, and how many steps has it done (None: it did not answer)."""
        pulse = replace(self, pending=pending)
        if steps_total is not None and self.steps_total < 0:  # the first look: what came before it says nothing
            return replace(pulse, steps_total=steps_total, progress_s=now_s)
        if steps_total is not None and steps_total != self.steps_total:
            return replace(pulse.progressed(now_s=now_s), steps_total=steps_total)
        if not pending or not self.pending:  # the clock runs while work is pending
            return replace(pulse, progress_s=now_s)
        return pulse

    def verdict(self, *, now_s: float) -> str | None:
        """Say that it is hung, None when it is not."""
        limit_s = self.patience_s if self.slow_work else self.deadline_s
        if not self.pending or now_s - self.progress_s < limit_s:
            return None
        return f"hung: work is pending and no step has finished for {now_s - self.progress_s:.0f} s"
