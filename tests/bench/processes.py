"""Starting programs that end with this one, and what /proc says of processes: CPU time, memory, children."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from engines.process import memory_pss_bytes

ROOT: Final = Path(__file__).resolve().parents[2]
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_END_GRACE_S: Final = 20.0


@asynccontextmanager
async def leashed(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a server, its output going to ``log``. It and its process group end with the scope, or with this process."""
    with log.open("ab") as out:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.leash", str(folder), *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            cwd=ROOT,
            start_new_session=True,  # what ends the benchmark's process group must not end the leash before the server
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()  # the leash lets go
        try:
            await asyncio.wait_for(process.wait(), _END_GRACE_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(children.get(pid, ()))
    for each in found:  # grows while it is read
        found += children.get(each, ())
    return found


def command_of(pid: int) -> str:
    """Return the command line of a process, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU time of these processes so far, user and system together; one that is gone counts nothing."""
    ticks = 0
    for pid in pids:
        if fields := _stat(pid):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def pss_bytes(pids: Iterable[int]) -> int:
    """Return the proportional set size of these processes together."""
    return sum(memory_pss_bytes(pid) or 0 for pid in pids)


def unshared_bytes(pids: Iterable[int]) -> int:
    """Return the memory of these processes that no file backs. Unlike the PSS of programs and libraries, it does not
    depend on who else runs the same ones."""
    return sum(_unshared_bytes(pid) for pid in pids)


def _unshared_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name: state, parent, ...; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
