"""What becomes of one model, told to all who want to know: events, log, metrics, the daemon."""

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

from flexpiped import log_events
from flexpiped.background import run_beside
from flexpiped.daemon_parts import DaemonParts
from flexpiped.events import Event, EventKind
from flexpiped.model_state import ModelState
from flexpiped.supervision import Supervision, SupervisorState


class Faring(Protocol):
    """A replica, as far as it counts here."""

    @property
    def has_failed(self) -> bool:
        """Whether it will not serve again."""


class ModelNews:
    """Writes to ``state`` what a start is doing.

    Args:
        replicas: Returns those that there are.
    """

    def __init__(self, parts: DaemonParts, state: ModelState, *, replicas: Callable[[], Sequence[Faring]]) -> None:
        self._parts = parts
        self._state = state
        self._replicas = replicas

    def progress(self, message: str) -> None:
        """The start goes on."""
        self._state.reason = message
        self._parts.on_progress(message)

    def engine(self, words: str) -> None:
        """Something of its engine is worth a word."""
        self._parts.events.publish(EventKind.ENGINE, words)

    def decided(self, decision: Event) -> None:
        """Count it; a decision that changes something belongs to what happened, and to the journal."""
        self._parts.metrics.decided(decision.fields["verb"])
        self._parts.on_decision(decision)
        if decision.fields["verb"] != "keep":
            self._parts.events.publish(EventKind.DECISION, decision.message, **decision.fields)

    def supervised(self, number: int, supervision: Supervision) -> None:
        """Tell how a replica fares. One that fails for good is the end only where no other one may serve."""
        replicas = self._replicas()
        reason = f"replica {number}: {supervision.reason}" if len(replicas) > 1 else supervision.reason
        self._parts.events.publish(EventKind.ENGINE, reason, state=supervision.state.value, replica=number)
        match supervision.state:
            case SupervisorState.RECOVERING:
                log_events.engine_recovering(reason=reason)
            case SupervisorState.FAILED if all(each.has_failed for each in replicas):
                self.given_up(reason)
            case SupervisorState.FAILED:
                log_events.engine_failed(reason=reason)
            case _:
                pass

    def given_up(self, reason: str) -> None:
        """It will not serve again."""
        log_events.engine_failed(reason=reason)
        self._parts.on_given_up(reason)

    def run_beside(self, stack: AsyncExitStack, work: Coroutine[None, None, None], *, name: str) -> None:
        """Run what goes on beside the service until ``stack`` is left; if it fails, that is told."""
        run_beside(stack, work, name=name, on_failure=lambda said: self._parts.events.publish(EventKind.DAEMON, said))
