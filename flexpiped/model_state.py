"""How far one model is in its life, and what that means for requests and changes (pure).

STARTING -> READY: what its engine does is its state -> DRAINING
"""

from dataclasses import dataclass
from typing import Final

from flexpiped.status import Health, ServiceState
from flexpiped.supervision import SHUTTING_DOWN, Supervision, SupervisorState

_STATES: Final = {
    SupervisorState.STARTING: ServiceState.STARTING,
    SupervisorState.READY: ServiceState.READY,
    SupervisorState.RECOVERING: ServiceState.RECOVERING,
    SupervisorState.ASLEEP: ServiceState.ASLEEP,
    SupervisorState.FAILED: ServiceState.FAILED,
    SupervisorState.CLOSING: ServiceState.DRAINING,
}


@dataclass(slots=True, kw_only=True)
class ModelState:
    """Written by what serves the model. ``closed_because``: why its engines end, once they do."""

    phase: ServiceState = ServiceState.STARTING  # READY: it is the engine's state that counts
    reason: str = "starting"
    closed_because: str = SHUTTING_DOWN

    @property
    def is_serving(self) -> bool:
        return self.phase is ServiceState.READY

    @property
    def is_draining(self) -> bool:
        return self.phase is ServiceState.DRAINING

    def serve(self) -> None:
        """It has started."""
        self.phase = ServiceState.READY

    def drain(self, reason: str, *, closed_because: str) -> None:
        """It takes nothing new any more."""
        self.phase, self.reason, self.closed_because = ServiceState.DRAINING, reason, closed_because

    def health(self, supervision: Supervision | None, *, text_failure: str | None) -> Health:
        """Return its state: what is done with it comes first, then what the engine is doing.

        Args:
            supervision: Of the engine in force; None: there is none yet.
            text_failure: Why its text process is gone for good.
        """
        if not self.is_serving or supervision is None:
            return Health(state=self.phase, reason=self.reason)
        if text_failure is not None:
            return Health(state=ServiceState.FAILED, reason=text_failure)
        state = _STATES[supervision.state]
        return Health(state=state, reason="" if state is ServiceState.READY else supervision.reason)

    def against_change(self, *, has_engine: bool) -> str:
        """Return why its layout may not be changed now; empty: it may."""
        if self.is_draining:
            is_daemon = self.closed_because == SHUTTING_DOWN
            return f"{'the daemon is draining' if is_daemon else self.closed_because}: {self.reason}"
        if self.phase is ServiceState.STARTING and has_engine:
            return f"the daemon is starting: {self.reason}"  # those replicas come first that are to come back
        return ""
