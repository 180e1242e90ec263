"""How far a model is in its life: pure."""

from flexpiped.model_state import ModelState
from flexpiped.status import ServiceState
from flexpiped.supervision import Supervision, SupervisorState

READY = Supervision(state=SupervisorState.READY, reason="the engine serves")
FAILED = Supervision(state=SupervisorState.FAILED, reason="the engine core exited with status 1")


def test_while_it_starts_its_engine_does_not_count() -> None:
    health = ModelState().health(READY, text_failure=None)

    assert (health.state, health.reason) == (ServiceState.STARTING, "starting")


def test_while_it_serves_its_state_is_that_of_its_engine() -> None:
    state = ModelState(reason="loading weights")
    state.serve()

    assert state.health(READY, text_failure=None).reason == ""
    health = state.health(FAILED, text_failure=None)
    assert (health.state, health.reason) == (ServiceState.FAILED, FAILED.reason)


def test_without_its_text_process_it_has_failed() -> None:
    state = ModelState()
    state.serve()

    assert state.health(READY, text_failure="it keeps dying").state is ServiceState.FAILED


def test_layouts_may_be_changed_before_there_is_an_engine_and_while_it_serves() -> None:
    state = ModelState()
    assert state.against_change(has_engine=False) == ""
    assert state.against_change(has_engine=True) == "the daemon is starting: starting"
    state.serve()
    assert state.against_change(has_engine=True) == ""


def test_while_it_drains_nothing_is_changed_and_the_reason_is_the_daemons_or_its_own() -> None:
    state = ModelState()
    state.drain("streams in flight are finishing", closed_because=state.closed_because)
    assert state.against_change(has_engine=True) == "the daemon is draining: streams in flight are finishing"

    state.drain("streams in flight are finishing", closed_because="model a is being stopped")
    assert state.against_change(has_engine=True) == "model a is being stopped: streams in flight are finishing"
