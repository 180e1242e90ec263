"""A vLLM server on the CPU, from an environment of its own, as a contestant."""

import asyncio
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.processes import leashed

_START_DEADLINE_S = 600.0


class VllmFailed(Exception):
    """The server did not come up; the message has the end of its log."""


@asynccontextmanager
async def vllm_server(
    python: Path, model: Path, *, threads: int, eager: bool, flags: Sequence[str] = ()
) -> AsyncIterator[str]:
    """Serve ``model`` as ``bench`` with two threads and no cores bound; yield the URL. The server ends with the scope.

    Raises:
        VllmFailed
    """
    with TemporaryDirectory(prefix="flexpiped-bench-vllm-") as name:
        folder = Path(name)
        log, url = folder / "log", f"http://127.0.0.1:{_free_port()}"
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "PYTHONPATH": "",  # our packages are none of its business
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [
            *(str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
            *("--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--served-model-name", "bench"),
            *("--dtype", "float32", "--max-num-seqs", "64", "--disable-uvicorn-access-log"),
            *(["--enforce-eager"] if eager else []),
            *flags,
        ]
        async with leashed(command, environment=environment, folder=folder, log=log) as process:
            if not await _is_up(url, process):
                raise VllmFailed(log.read_text(errors="replace")[-4000:])
            yield url


async def _is_up(url: str, process: asyncio.subprocess.Process) -> bool:
    deadline_s = time.monotonic() + _START_DEADLINE_S
    while time.monotonic() < deadline_s and process.returncode is None:
        if await asyncio.to_thread(_answers, f"{url}/health"):
            return True
        await asyncio.sleep(0.5)
    return False


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
