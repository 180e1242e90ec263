"""HTTP to the daemon over its Unix socket.

CtlError
+-- NotReachable   no daemon answers; the message says where it was looked for
+-- Refused        the daemon said no: busy, infeasible, nothing to do
+-- Failed         the daemon could not; ``code`` and message are its own
+-- BadUsage       what was typed cannot be asked for
"""

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

ANSWER_DEADLINE_S: Final = 30.0
_REFUSALS: Final = frozenset(
    {"busy", "refused", "unsupported", "infeasible", "invalid_layout", "nothing_to_cancel", "bad_request"}
    | {"unknown_model", "which_model"}
)


class CtlError(Exception):
    """Base of what can go wrong; ``code`` is for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NotReachable(CtlError):
    """No daemon answers."""


class Refused(CtlError):
    """The daemon refused; nothing moved."""


class Failed(CtlError):
    """The daemon tried or could not."""


class BadUsage(CtlError):
    """What was typed cannot be asked for."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, connected: socket.socket) -> None:
        super().__init__("flexpiped")
        self.sock = connected

    def connect(self) -> None:
        raise NotReachable("not_reachable", "the daemon closed the connection")


class AdminClient:
    """Calls the admin API at the first of ``sockets`` that answers."""

    def __init__(self, sockets: Sequence[Path]) -> None:
        self._sockets = sockets

    def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the answer to one request.

        Raises:
            NotReachable, Refused, Failed
        """
        with closing(self._connect()) as connection:
            try:
                answer: dict[str, Any] = json.loads(_request(connection, method, path, body).read())
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error) from None
            except ValueError as error:
                raise Failed("bad_answer", f"the daemon's answer is not JSON: {error}") from None
            return answer

    def stream(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the JSON objects of a streaming answer, or the one object of a plain one.

        Raises:
            NotReachable, Refused, Failed
        """
        with closing(self._connect()) as connection:
            try:
                response = _request(connection, method, path, body)
                connection.sock.settimeout(None)
                while line := response.readline():
                    yield json.loads(line)
            except (OSError, http.client.HTTPException) as error:
                raise _broken(error) from None

    def _connect(self) -> _UnixConnection:
        tried: list[str] = []
        is_barred = False
        for path in self._sockets:
            try:
                return _UnixConnection(_connect(path))
            except OSError as error:
                tried.append(f"{path} ({_reason(error)})")
                is_barred = is_barred or isinstance(error, PermissionError)
        start = "Start it: systemctl start flexpiped, or make run."
        join = "To be one of the group: usermod -aG flexpiped USER, by root, and log in anew."
        raise NotReachable(
            "not_reachable",
            f"no daemon at {' or '.join(tried)}. {join if is_barred else start}",
        )


def _connect(path: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(ANSWER_DEADLINE_S)
        connected.connect(str(path))
    except OSError:
        connected.close()
        raise
    return connected


def _reason(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, PermissionError):
        return "permission denied: only its owner and group may"
    return os.strerror(error.errno) if error.errno else str(error)


def _request(
    connection: _UnixConnection, method: str, path: str, body: Mapping[str, Any] | None
) -> http.client.HTTPResponse:
    content = None if body is None else json.dumps(body)
    connection.request(method, path, body=content, headers={"Content-Type": "application/json"} if content else {})
    response = connection.getresponse()
    if response.status >= 400:
        _raise_error(response)
    return response


def _raise_error(response: http.client.HTTPResponse) -> None:
    try:
        error = json.loads(response.read())["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = "bad_answer", f"the daemon answered {response.status} {response.reason}"
    raise (Refused if code in _REFUSALS else Failed)(code, message)


def _broken(error: Exception) -> CtlError:
    if isinstance(error, TimeoutError):
        return NotReachable("no_answer", f"the daemon did not answer within {ANSWER_DEADLINE_S:.0f} s")
    return NotReachable("connection_lost", f"the connection to the daemon was lost: {error}")
