"""When to start a process again that died, and when to stop trying. Pure: no clock, no process."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Delays double from ``first_delay_s`` to ``max_delay_s``; death ``max_deaths`` within ``window_s`` is the last."""

    max_deaths: int = 5
    window_s: float = 300.0
    first_delay_s: float = 0.1
    max_delay_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    reason: str


def after_death(deaths_s: tuple[float, ...], *, policy: RestartPolicy) -> Restart | GiveUp:
    """Decide after the last of ``deaths_s`` (times in order), which has just happened.

    1. ``max_deaths`` within ``window_s``: give up.
    2. Else restart, later with each death within the window.
    """
    recent = sum(1 for death_s in deaths_s if deaths_s[-1] - death_s < policy.window_s)
    if recent >= policy.max_deaths:  # 1
        return GiveUp(reason=f"died {recent} times within {policy.window_s:g} s")
    return Restart(after_s=min(policy.first_delay_s * 2 ** (recent - 1), policy.max_delay_s))  # 2
