"""A server that speaks HTTP on a port of its own, started for a benchmark and ended with it."""

import asyncio
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.processes import leashed

_START_DEADLINE_S = 600.0


class ServerFailed(Exception):
    """The server did not come up; the message has the end of its log."""


@asynccontextmanager
async def plain_server(
    python: Path, words: Sequence[str], *, environment: Mapping[str, str], health: str = "/health"
) -> AsyncIterator[str]:
    """Run ``python`` with these words and ``--host --port``; yield the URL once ``health`` answers 200.

    Raises:
        ServerFailed
    """
    with TemporaryDirectory(prefix="flexpiped-bench-server-") as name:
        folder = Path(name)
        log, port = folder / "log", free_port()
        inherited = {
            "PYTHONPATH": "",  # our packages are none of its business
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": str(folder),
        }
        command = [str(python), *words, "--host", "127.0.0.1", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        async with leashed(command, environment={**inherited, **environment}, folder=folder, log=log) as process:
            if not await is_up(f"{url}{health}", process):
                raise ServerFailed(log.read_text(errors="replace")[-4000:])
            yield url


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


async def is_up(url: str, process: asyncio.subprocess.Process) -> bool:
    """Return whether ``url`` answers 200 before the process ends."""
    deadline_s = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline_s and process.returncode is None:
        if await asyncio.to_thread(_answers, url):
            return True
        await asyncio.sleep(0.5)
    return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
