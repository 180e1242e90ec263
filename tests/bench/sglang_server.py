"""A plain SGLang server on the CPU, and sglang-router in front of one, from environments of their own."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from engines.sglang.command import thread_bindings
from tests.bench.plain_server import free_port, plain_server
from tests.bench.program import EngineSetup

_KV_TOKENS = 64 << 10  # as EngineSetup's KV cache holds


@asynccontextmanager
async def sglang_server(python: Path, model: Path, setup: EngineSetup, *, batched_tokens: int) -> AsyncIterator[str]:
    """Serve ``model`` as ``bench`` on one rank, set up as flexpiped does; yield the URL. It ends with the scope.

    Raises:
        ServerFailed
    """
    with TemporaryDirectory(prefix="flexpiped-bench-sglang-") as folder:
        environment = {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/rendezvous",
            "SGLANG_CPU_OMP_THREADS_BIND": thread_bindings(
                sorted(os.sched_getaffinity(0)), ranks=1, threads=setup.threads
            ),
            "OMP_NUM_THREADS": str(setup.threads),
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHDYNAMO_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        words = [
            *("-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", "bench"),
            *("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32"),
            *("--mem-fraction-static", "0.9", "--max-total-tokens", str(_KV_TOKENS), "--max-running-requests", "64"),
            *("--chunked-prefill-size", str(batched_tokens), "--sampling-backend", "pytorch"),
            *("--nccl-port", str(free_port()), "--skip-server-warmup", "--log-level", "warning"),
            "--sleep-on-idle",  # else its scheduler would poll through the turns of the others
        ]
        async with plain_server(python, words, environment=environment, health="/model_info") as url:
            yield url


@asynccontextmanager
async def sglang_router(python: Path, worker_url: str) -> AsyncIterator[str]:
    """Run sglang-router in front of one server; yield its URL. It ends with the scope.

    Raises:
        ServerFailed
    """
    words = [
        *("-m", "sglang_router.launch_router", "--worker-urls", worker_url),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "warn"),
    ]
    async with plain_server(python, words, environment={}, health="/readiness") as url:
        yield url
