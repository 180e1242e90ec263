"""What systemd runs in an engine's unit becomes the engine that the daemon asks for."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENGINE = """
import os, socket
connection, listener = socket.socket(fileno=3), socket.socket(fileno=4)
connection.sendall(f"{os.getpid()} {listener.getsockname()} {os.environ['GREETING']}".encode())
"""
AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execv(sys.executable, [sys.executable, "-P", "-m", "engines.unit_launcher"])
"""


def test_it_runs_what_is_asked_for_with_both_sockets_and_the_same_pid(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    path = tmp_path / "engine.sock"
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        process = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        theirs.close()
        asked = {"command": [sys.executable, "-c", ENGINE], "environment": {"GREETING": "hello"}}
        socket.send_fds(ours, [json.dumps(asked).encode() + b"\n"], [listener.fileno()])
        said = b""
        while part := ours.recv(4096):
            said += part
        assert process.wait() == 0
    assert said.decode() == f"{process.pid}\n{process.pid} {path} hello"
