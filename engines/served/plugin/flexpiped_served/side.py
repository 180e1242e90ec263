"""A side channel: a thread that answers the daemon over a Unix socket, beside the steps.

One JSON object a line. What may wait for a step comes through the engine's own queue; what may not comes here:
preparing, releasing, status.
"""

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Reply = Callable[[dict[str, Any]], None]


class SideChannel:
    """Serves one connection at a time.

    Args:
        handle: Called in the side channel's thread with a message and the function that sends an answer; answers may
            be sent later and from any thread.
        greeting: Sent to whoever connects.
    """

    def __init__(
        self,
        path: Path,
        handle: Callable[[dict[str, Any], Reply], None],
        *,
        greeting: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._handle = handle
        self._greeting = greeting
        self._lock = threading.Lock()
        threading.Thread(target=self._serve, name="flexpiped-side", daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, connection.makefile("rb") as lines:
                if self._greeting is not None:
                    self._send(connection, self._greeting())
                for line in lines:
                    self._handle(json.loads(line), lambda answer, to=connection: self._send(to, answer))

    def _send(self, connection: socket.socket, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode() + b"\n"
        with self._lock, suppress(OSError):  # the daemon is gone, and with it who waits
            connection.sendall(data)
