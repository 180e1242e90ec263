"""A vLLM server on the CPU, from an environment of its own, as a contestant."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.bench.plain_server import plain_server


@asynccontextmanager
async def vllm_server(
    python: Path, model: Path, *, threads: int, eager: bool, flags: Sequence[str] = ()
) -> AsyncIterator[str]:
    """Serve ``model`` as ``bench`` with two threads and no cores bound; yield the URL. The server ends with the scope.

    Raises:
        ServerFailed
    """
    with TemporaryDirectory(prefix="flexpiped-bench-vllm-") as cache:
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": cache,
        }
        words = [
            *("-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "bench"),
            *("--dtype", "float32", "--max-num-seqs", "64", "--disable-uvicorn-access-log"),
            *(["--enforce-eager"] if eager else []),
            *flags,
        ]
        async with plain_server(python, words, environment=environment) as url:
            yield url
