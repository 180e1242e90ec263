"""A clock that a test sets, for what takes one."""

from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """Called, it says what it was set to."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s
