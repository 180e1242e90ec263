"""How a request ended, as it is counted: the values of one label, which alerts go by."""

from enum import Enum
from typing import Final

from flexpiped.admission import OverloadReason
from flexpiped.status import ServiceState


class Outcome(Enum):
    DONE = "done"
    REFUSED = "refused"  # 4xx but 429: the request is at fault
    OVERLOADED = "overloaded"  # there was no room for it: at once (429), or for as long as it may wait (503)
    LATE = "late"  # its client's own deadline came first, in the line or in the answer
    UNAVAILABLE = "unavailable"  # 503: the service starts or ends, as somebody wanted it to
    FAILED = "failed"  # any other 5xx, before the answer or in its midst
    DISCONNECTED = "disconnected"  # its client had gone, or had stopped reading


_BY_CODE: Final = {
    OverloadReason.QUEUE_TIMEOUT.value: Outcome.OVERLOADED,
    OverloadReason.DEADLINE.value: Outcome.LATE,
    ServiceState.STARTING.value: Outcome.UNAVAILABLE,
    ServiceState.DRAINING.value: Outcome.UNAVAILABLE,
    ServiceState.STOPPED.value: Outcome.UNAVAILABLE,
    "shutting_down": Outcome.UNAVAILABLE,
}


def outcome_of(status: int, code: str | None = None) -> Outcome:
    """Return what a request counts as that was answered with an error.

    Args:
        code: For machines, of an answer of ours: a status of 503 alone does not tell a full house from a broken one.
    """
    if status == 429:
        return Outcome.OVERLOADED
    if status < 500:
        return Outcome.REFUSED
    return _BY_CODE.get(code or "", Outcome.FAILED)
