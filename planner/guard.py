"""What a change is held to: what its layout, and the one before it, would have done with the very requests that came.

A prediction for all traffic says little of the few seconds after a change: a change is made in a burst, and who came
before it, or came with the next one, waits behind others whatever the layout is. So each layout is also followed as a
queue: it begins with those who were there when the change was done, each arrival joins it, and it shrinks as fast as
that layout is predicted to serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SinceChange:
    """What came since the layout in force is there.

    Attributes:
        at_s: When it came into force.
        inherited: Requests that were there already, waiting or running.
        came_s: When the first ones after that came, in order: as many as are remembered.
    """

    at_s: float
    inherited: float = 0.0
    came_s: Sequence[float] = ()


def latency_in_queue_s(since: SinceChange, *, served_per_s: float, alone_s: float) -> float:
    """Return the mean latency that these requests would have had, one after the other, in a layout of that capacity.

    Args:
        since: Who was there, and who came.
        served_per_s: Requests that the layout serves, all replicas together; positive.
        alone_s: What a request takes in calm traffic: none takes less.
    """
    if not since.came_s:
        return alone_s
    inside, last_s, total_s = since.inherited, since.at_s, 0.0
    for came_s in since.came_s:
        inside = max(0.0, inside - served_per_s * (came_s - last_s)) + 1
        total_s += max(alone_s, inside / served_per_s)
        last_s = came_s
    return total_s / len(since.came_s)
