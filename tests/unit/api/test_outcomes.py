"""What a request counts as that was answered with an error."""

import pytest

from engines.errors import EngineClosed, EngineDied, EngineError, InvalidRequest
from flexpiped.admission import Overloaded, OverloadReason
from flexpiped.api.errors import ApiError, from_engine_error, from_overloaded, too_late, unavailable
from flexpiped.api.outcomes import Outcome, outcome_of
from flexpiped.status import ServiceState


def told(error: ApiError) -> Outcome:
    return outcome_of(error.status, error.code)


@pytest.mark.parametrize("reason", OverloadReason)
def test_no_room_is_overload_and_no_failure(reason: OverloadReason) -> None:
    error = from_overloaded(Overloaded("full", reason=reason, retry_after_s=1))

    assert told(error) is (Outcome.LATE if reason is OverloadReason.DEADLINE else Outcome.OVERLOADED)


def test_a_clients_own_deadline_is_no_failure() -> None:
    assert told(too_late("late")) is Outcome.LATE


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (ServiceState.STARTING, Outcome.UNAVAILABLE),
        (ServiceState.DRAINING, Outcome.UNAVAILABLE),
        (ServiceState.STOPPED, Outcome.UNAVAILABLE),
        (ServiceState.FAILED, Outcome.FAILED),
    ],
)
def test_a_service_that_does_not_serve(state: ServiceState, outcome: Outcome) -> None:
    assert told(unavailable("not now", code=state.value)) is outcome


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (EngineClosed("ends"), Outcome.UNAVAILABLE),
        (EngineDied("died"), Outcome.FAILED),
        (EngineError("a bug"), Outcome.FAILED),
        (InvalidRequest("no", parameter="n"), Outcome.REFUSED),
    ],
)
def test_what_engines_raise(error: EngineError, outcome: Outcome) -> None:
    assert told(from_engine_error(error)) is outcome


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (400, Outcome.REFUSED),
        (404, Outcome.REFUSED),
        (413, Outcome.REFUSED),
        (429, Outcome.OVERLOADED),
        (500, Outcome.FAILED),
        (503, Outcome.FAILED),
    ],
)
def test_by_the_status_where_there_is_no_code_of_ours(status: int, outcome: Outcome) -> None:
    assert outcome_of(status) is outcome
