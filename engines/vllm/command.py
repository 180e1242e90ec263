"""From options and boot layout to vLLM's command line and environment. Pure.

The daemon owns what decides layout, memory, sockets and devices: such a flag among ``engines.vllm.args`` is refused
with the key that sets it. Everything else passes through, after our own flags, so it wins over our defaults.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from engines.served.environment import common_environment, with_users, words_of
from engines.served.options import threads_per_rank
from engines.served.owned import Owned
from engines.served.run_directory import HTTP_SOCKET
from engines.vllm.options import VllmOptions, num_kv_blocks

PLUGIN: Final = Path(__file__).with_name("plugin")
_LAYOUT: Final = "the layout decides it (stages, engines.vllm.ranks)"
_SOCKET: Final = "vLLM listens on a private Unix socket"
_ONE: Final = "the daemon runs one replica on one host per vLLM"
# Each flag that the daemon owns, with what says it instead.
OWNED: Final[Mapping[str, str]] = {
    "--model": "model",
    "--served-model-name": "served_model_name",
    "--dtype": "dtype",
    "--max-model-len": "max_model_len",
    "--revision": "revision",
    "--tokenizer": "tokenizer",
    "--trust-remote-code": "trust_remote_code",
    "--hf-token": "hf_token_file",
    "--tensor-parallel-size": "engines.vllm.tensor_parallel",
    "--block-size": "engines.vllm.kv_block_tokens",
    "--kv-cache-memory-bytes": "engines.vllm.kv_cache",
    "--num-gpu-blocks-override": "engines.vllm.kv_cache",
    "--gpu-memory-utilization": "engines.vllm.kv_cache, in bytes",
    "--device-memory-utilization": "engines.vllm.kv_cache, in bytes",
    "--max-num-seqs": "engines.vllm.max_num_seqs",
    "--max-num-batched-tokens": "engines.vllm.max_num_batched_tokens",
    "--enforce-eager": "engines.vllm.compile",
    "--pipeline-parallel-size": _LAYOUT,
    "--device-ids": _LAYOUT,
    "--worker-cls": "flexpiped's own worker class is needed",
    "--distributed-executor-backend": "vLLM's processes are the daemon's to watch",
    "--config": "write its keys as flags here",
    "--host": _SOCKET,
    "--port": _SOCKET,
    "--uds": _SOCKET,
    "--grpc": _SOCKET,
    "--grpc-port": _SOCKET,
    "--headless": _ONE,
    "--api-server-count": _ONE,
    "--nnodes": _ONE,
    "--node-rank": _ONE,
    "--master-addr": _ONE,
    "--master-port": _ONE,
    "--data-parallel-size": _ONE,
}
_SHORT: Final = {
    "-pp": "--pipeline-parallel-size",
    "-tp": "--tensor-parallel-size",
    "-dp": "--data-parallel-size",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-asc": "--api-server-count",
}
_OWNED_ENV: Final[Mapping[str, str]] = {
    "VLLM_PP_LAYER_PARTITION": _LAYOUT,
    "VLLM_CPU_KVCACHE_SPACE": "engines.vllm.kv_cache",
    "VLLM_HOST_IP": _ONE,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "vLLM's processes are the daemon's to watch",
    "CUDA_VISIBLE_DEVICES": _LAYOUT,
    "OMP_NUM_THREADS": "engines.vllm.threads",
    "PYTHONPATH": "vLLM's environment is its own: install packages there",
    "PYTHONHOME": "vLLM's environment is its own",
    "TMPDIR": "vLLM's temporary files are the daemon's to clean up",
}
_OWNED_HERE: Final = Owned(package="vllm", flags=OWNED, short=_SHORT, variables=_OWNED_ENV)


def owned_flag(argument: str) -> str | None:
    """Return the flag of the daemon's that ``argument`` is, however it is written."""
    return _OWNED_HERE.flag_of(argument)


def command_line(options: VllmOptions, *, counts: Sequence[int], run_dir: Path) -> list[str]:
    """Return vLLM's command line for ``counts`` decoders on each pipeline rank. Raises: UnsupportedByEngine."""
    _OWNED_HERE.refuse(args=options.args, env=options.env)
    blocks = num_kv_blocks(options)
    # The number of blocks is what counts; the bytes only have to be enough for the rank with most layers.
    rank_bytes = blocks * options.kv_block_tokens * options.kv_bytes_per_token * max(counts) // options.tensor_parallel
    flags = {
        "--uds": str(run_dir / HTTP_SOCKET),
        "--pipeline-parallel-size": len(counts),
        "--tensor-parallel-size": options.tensor_parallel,
        # One rank needs no process of its own: vLLM then runs it in the engine core, without queues between them.
        "--distributed-executor-backend": "mp" if len(options.device_ids) > 1 else "uni",
        "--worker-cls": f"flexpiped_vllm.worker.{'GPU' if options.cuda else 'CPU'}Worker",
        "--dtype": options.dtype,
        "--max-model-len": options.max_model_len or "auto",
        "--block-size": options.kv_block_tokens,
        "--num-gpu-blocks-override": blocks,
        "--kv-cache-memory-bytes": rank_bytes,
        "--max-num-seqs": options.max_num_seqs,
        "--max-num-batched-tokens": options.max_num_batched_tokens,
        "--uvicorn-log-level": "warning",
    }
    more = [
        *([] if options.compile else ["--enforce-eager"]),
        # A step in flight beside the scheduler's next one would not know of a commit between them.
        "--no-async-scheduling",
        "--disable-uvicorn-access-log",
    ]
    return [
        *(options.python, "-m", "vllm.entrypoints.cli.main", "serve", options.model_directory),
        *words_of(options, flags, tokenizer_flag="--tokenizer", more=more),
    ]


def environment(
    options: VllmOptions,
    *,
    counts: Sequence[int],
    run_dir: Path,
    inherited: Mapping[str, str],
    daemon_prefix: str,
    cores: int,
    hf_token: str = "",
) -> dict[str, str]:
    """Return the environment of vLLM's processes: the daemon's without its Python, then ours, then the user's.

    Args:
        inherited: The daemon's environment.
        daemon_prefix: ``sys.prefix`` of the daemon, whose programs are none of vLLM's business.
        hf_token: The content of ``hf_token_file``.
    """
    _OWNED_HERE.refuse(args=options.args, env=options.env)
    env = common_environment(
        options,
        package="vllm",
        plugin=PLUGIN,
        run_dir=run_dir,
        nice=_nice(options),
        inherited=inherited,
        daemon_prefix=daemon_prefix,
        hf_token=hf_token,
    )
    env |= {
        "VLLM_PP_LAYER_PARTITION": ",".join(map(str, counts)),
        "VLLM_RPC_BASE_PATH": str(run_dir),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": side_channel_address(run_dir),
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would not load its plugins again
    }
    if len(counts) == 1:
        del env["VLLM_PP_LAYER_PARTITION"]  # vLLM refuses it for one rank of some models, and it says nothing
    if cache := inherited.get("CACHE_DIRECTORY"):  # a service may have no home
        env["VLLM_CACHE_ROOT"] = str(Path(cache) / "vllm")
    if not options.compile and (kept := _cache_of(inherited)) is not None:
        # Torch compiles parts of vLLM in eager mode, too. By itself it keeps them in TMPDIR, which ends with vLLM.
        env["TORCHINDUCTOR_CACHE_DIR"] = str(kept / "eager_inductor_cache")
    if not options.cuda:
        env |= {
            "OMP_NUM_THREADS": str(threads_per_rank(options, cores=cores)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if len(options.device_ids) == 1:
            # Else vLLM for the CPU turns "uni" into "mp": a worker process, and a core that polls for its answers. The
            # reason given, that threads cannot be bound then, is none here. Nothing else of a server reads this.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return with_users(env, options, plugins="VLLM_PLUGINS")


def side_channel_address(run_dir: Path) -> str:
    """Return a loopback address that is this vLLM's: NIXL's port is the same in every vLLM, and there may be two."""
    number = int.from_bytes(hashlib.blake2b(str(run_dir).encode(), digest_size=3).digest())
    return f"127.{number >> 16 & 127}.{number >> 8 & 255}.{number & 255 or 1}"


def _cache_of(inherited: Mapping[str, str]) -> Path | None:
    """Return where vLLM keeps what it may need again."""
    if service := inherited.get("CACHE_DIRECTORY"):
        return Path(service) / "vllm"
    if named := inherited.get("XDG_CACHE_HOME"):
        return Path(named) / "vllm"
    return Path(inherited["HOME"]) / ".cache" / "vllm" if "HOME" in inherited else None


def _nice(options: VllmOptions) -> int:
    """Return the niceness of ranks. It is for workers, which poll; a single rank runs in the core and does not."""
    return options.nice if len(options.device_ids) > 1 else 0
