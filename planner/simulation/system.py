"""Who decides in a simulation: the interface; flexpiped's own policy and the other systems are beside it."""

from typing import Protocol

from planner.load import Observation
from planner.simulation.fleet import Fleet


class System(Protocol):
    """What decides."""

    def begin(self, fleet: Fleet) -> None:
        """Bring up what serves from the start."""

    def tick(self, observation: Observation, now_s: float) -> str:
        """Look, act on the fleet, and return the reason in words."""

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:
        """Return until when it would do nothing, as long as nothing happens before ``next_s``; ``now_s``: it may act.

        Asked where nobody is there, no replica is about to come, go or change, and ``observation.is_quiet``.
        """
