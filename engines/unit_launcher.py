"""What systemd runs in an engine's own unit (``flexpiped-engine@.service``): becomes what the daemon asks for.

The daemon, without any right to start units, connects to ``flexpiped-engine.socket``; systemd starts this program in a
unit of its own, with that connection as descriptor 3. One line of JSON says what to run, with a socket beside it that
becomes descriptor 4; the answer is a line with the pid. From there on the connection belongs to the engine. Only the
daemon's user may connect. Standard library only.
"""

import json
import os
import socket
import struct
import sys
from typing import Any, NoReturn

_CONNECTION, _LISTENER = 3, 4
_MOST_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("3i")


def main() -> NoReturn:
    """Become what was asked for."""
    connection = socket.socket(fileno=_CONNECTION)
    if _uid_of(connection) != os.geteuid():
        sys.exit("flexpiped engine: somebody else than the daemon's user asks")
    asked, listener = _receive(connection)
    if listener != _LISTENER:
        os.dup2(listener, _LISTENER)
        os.close(listener)
    command, environment = asked["command"], asked["environment"]
    connection.sendall(f"{os.getpid()}\n".encode())
    for number in (_CONNECTION, _LISTENER):
        os.set_inheritable(number, True)
    own = {name: value for name, value in os.environ.items() if name in ("INVOCATION_ID", "JOURNAL_STREAM")}
    os.execve(command[0], command, environment | own)


def _uid_of(connection: socket.socket) -> int:
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return int(uid)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], int]:
    line, descriptors, _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
    while not line.endswith(b"\n"):
        more = connection.recv(_MOST_BYTES)
        if not more:
            raise EOFError("the daemon is gone")
        line += more
    return json.loads(line), descriptors[0]


if __name__ == "__main__":
    main()
