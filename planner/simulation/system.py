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
