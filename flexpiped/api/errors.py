"""Errors of the API, and what they look like on the wire.

ApiError              an answer with a status, in OpenAI's shape; every foreign error becomes one here
ClientStoppedReading  the answer has begun, and nothing more can be said: its connection is to be closed
"""

from dataclasses import dataclass
from enum import Enum

import msgspec

from engines.errors import EngineClosed, EngineDied, EngineError, InvalidRequest
from engines.text.errors import TextClosed, TextProcessDied, TextRefused
from flexpiped.admission import Overloaded, OverloadReason

RETRY_AFTER_S = 5  # when nothing better is known: about what it takes to start an engine again


class ErrorType(Enum):
    INVALID_REQUEST = "invalid_request_error"
    NOT_FOUND = "not_found_error"
    AUTHENTICATION = "authentication_error"
    PERMISSION = "permission_error"
    OVERLOADED = "rate_limit_error"
    UNAVAILABLE = "service_unavailable_error"
    INTERNAL = "internal_error"


@dataclass(eq=False, kw_only=True)
class ApiError(Exception):
    """An answer that is an error. ``param`` names the parameter at fault, ``code`` is for machines."""

    status: int
    type: ErrorType
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def encode(self) -> bytes:
        """Return the JSON body."""
        error = {"message": self.message, "type": self.type.value, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


class ClientStoppedReading(Exception):
    """The client takes nothing of its answer, and its deadline has come."""


def invalid(message: str, *, param: str | None, code: str | None = None) -> ApiError:
    """A request that can never be served as it is."""
    return ApiError(status=400, type=ErrorType.INVALID_REQUEST, message=message, param=param, code=code)


def unavailable(message: str, *, code: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    """Not now, through no fault of the request."""
    return ApiError(status=503, type=ErrorType.UNAVAILABLE, message=message, code=code, retry_after_s=retry_after_s)


def too_late(message: str) -> ApiError:
    """What the client allowed was not enough."""
    return ApiError(
        status=503,
        type=ErrorType.UNAVAILABLE,
        message=message,
        param="X-Request-Deadline-Ms",
        code=OverloadReason.DEADLINE.value,
        retry_after_s=1,
    )


def from_overloaded(error: Overloaded) -> ApiError:
    waited = error.reason in (OverloadReason.DEADLINE, OverloadReason.QUEUE_TIMEOUT)
    return ApiError(
        status=503 if waited else 429,
        type=ErrorType.UNAVAILABLE if waited else ErrorType.OVERLOADED,
        message=f"{error}; retry in {error.retry_after_s} s",
        code=error.reason.value,
        retry_after_s=error.retry_after_s,
    )


def from_engine_error(error: EngineError) -> ApiError:
    """Return the answer for what an engine or the text process raised."""
    match error:
        case InvalidRequest():
            return invalid(str(error), param=error.parameter, code=error.code)
        case TextRefused():
            return invalid(str(error), param=None, code="invalid_prompt")
        case EngineClosed() | TextClosed():
            return unavailable(str(error), code="shutting_down")
        case EngineDied() | TextProcessDied():
            return unavailable(str(error), code="engine_unavailable")
        case _:
            return ApiError(status=500, type=ErrorType.INTERNAL, message=str(error), code="engine_error")


def from_http_status(status: int, *, message: str) -> ApiError:
    """Return the answer for what the web framework refused by itself."""
    kind = ErrorType.NOT_FOUND if status == 404 else ErrorType.INVALID_REQUEST
    return ApiError(status=status, type=kind if status < 500 else ErrorType.INTERNAL, message=message)
