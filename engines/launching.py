"""Starts a program of ours that runs an engine: bound to the daemon, or in a session or unit of its own.

It is told by its command line which descriptor is the connection to the daemon, on which parent it depends (0: none),
and which descriptor listens for the next daemon, where it may outlive this one.
"""

import asyncio
import json
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engines.errors import EngineStartFailed
from engines.found_process import FoundProcess, start_of
from engines.process import import_root, lasting_import_root

_LAUNCH_DEADLINE_S = 30.0  # systemd sets a sandbox up before it starts anything in it


class CoreProcess(Protocol):
    """The program's process, whoever its parent is."""

    @property
    def pid(self) -> int: ...

    async def ended(self) -> str:
        """Wait until it has ended; say how."""

    def kill(self) -> None:
        """Kill it, if it still runs."""

    def let_go(self) -> None:
        """Forget it; it runs on. Idempotent."""


class ChildProcess:
    """One whose parent this process is."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ended(self) -> str:
        status = await self._process.wait()
        return f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    def let_go(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPlace:
    """Where an engine lives that outlives its daemon.

    Attributes:
        socket: The path at which the next daemon finds it.
        log: Where its processes write what they have to say.
        launcher: The socket at which systemd starts engines in units of their own; None: a session of its own it is.
        runs: A folder for its run directory that daemon and engine both see; None: where temporary files are.
    """

    socket: Path
    log: Path
    launcher: Path | None
    runs: Path | None = None


def command_of(python: str, module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs the program."""
    return (python or sys.executable, "-m", module, *arguments)


async def launch_bound(python: str, module: str) -> tuple[CoreProcess, socket.socket]:
    """Start a program that dies with this process; return it and the connection to it.

    Raises:
        EngineStartFailed
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await _child(python, module, theirs, os.getpid(), root=import_root())
        except BaseException:
            ours.close()
            raise
    return process, ours


async def launch_apart(python: str, place: OwnPlace, module: str) -> tuple[CoreProcess, socket.socket]:
    """Start a program that may outlive this process; return it and the connection to it.

    Raises:
        EngineStartFailed
    """
    folder = place.socket.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    root = lasting_import_root(folder / "import")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(str(place.socket))
        except OSError as error:
            raise EngineStartFailed(f"{place.socket}: {error.strerror or error}") from error
        if place.launcher is not None:
            return await asyncio.to_thread(_launch_in_unit, python, module, place.launcher, listener, root)
        ours, theirs = socket.socketpair()
        with theirs, place.log.open("ab") as log:
            try:
                process = await _child(python, module, theirs, 0, root=root, listener=listener, log=log.fileno())
            except BaseException:
                ours.close()
                raise
        return process, ours


async def _child(
    python: str,
    module: str,
    connection: socket.socket,
    parent_pid: int,
    *,
    root: Path,
    listener: socket.socket | None = None,
    log: int | None = None,
) -> ChildProcess:
    """Start it as a child, in a session of its own: Ctrl-C at a terminal is for the daemon alone."""
    passed = [connection.fileno(), *([] if listener is None else [listener.fileno()])]
    command = command_of(python, module, str(passed[0]), str(parent_pid), *(str(number) for number in passed[1:]))
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            pass_fds=passed,
            env=_environment(root),
            stdin=DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except OSError as error:
        raise EngineStartFailed(f"cannot run {command[0]}: {error.strerror}") from error
    return ChildProcess(process)


def _launch_in_unit(
    python: str, module: str, launcher: Path, listener: socket.socket, root: Path
) -> tuple[CoreProcess, socket.socket]:
    """Have systemd start it (``engines.unit_launcher``). The connection to systemd is then that to the program."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_LAUNCH_DEADLINE_S)
    try:
        connection.connect(str(launcher))
        asked = {"command": command_of(python, module, "3", "0", "4"), "environment": _environment(root)}
        socket.send_fds(connection, [json.dumps(asked).encode() + b"\n"], [listener.fileno()])
        answer = _read_line(connection)
        process = None if not answer.isdigit() else FoundProcess.hold(int(answer), start=start_of(int(answer)))
        if process is None:
            raise EngineStartFailed(f"the engine's unit did not start ({answer or 'nothing said'}); see journalctl")
    except OSError as error:
        connection.close()
        raise EngineStartFailed(f"{launcher}: {error.strerror or error}") from error
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return process, connection


def _read_line(connection: socket.socket) -> str:
    """Read to the end of a line and no further: what follows is the program's."""
    read = b""
    while not read.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            break
        read += byte
    return read.decode(errors="replace").strip()


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: the core forks, so it must have no threads
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", "")))),
    }
