"""What a vLLM consists of, and so may leave behind: processes, shared memory, its directory."""

import tempfile
from pathlib import Path

from engines.process import state_of
from engines.vllm.adapter import VllmEngine


def runs(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    state = state_of(pid)
    return state is not None and state[0] not in "ZX"


def processes_of(engine: VllmEngine) -> list[int]:
    pids = engine.pids
    return [pids["api"], pids["core"], *pids["workers"], *pids["helpers"]]


def shared_memory(run_directory: Path) -> list[Path]:
    """Return what is listed to go with a run directory."""
    names = (run_directory / "shared-memory").read_text().split()
    return [Path("/dev/shm") / name for name in names]


def run_directory_of(daemon_pid: int) -> Path:
    """Return the private directory of the vLLM that a daemon has started."""
    (directory,) = (
        owner.parent
        for owner in Path(tempfile.gettempdir()).glob("flexpiped-engine-*/owner")
        if owner.read_text().split()[0] == str(daemon_pid)
    )
    return directory


def descendants(pid: int) -> list[int]:
    """Return the processes below one."""
    children = [int(child) for of in Path(f"/proc/{pid}/task").glob("*/children") for child in of.read_text().split()]
    return [below for child in children for below in (child, *descendants(child))]
