"""From options and boot layout to SGLang's command line and environment. Pure.

The daemon owns what decides layout, memory, sockets and devices: such a flag among ``engines.sglang.args`` is refused
with the key that sets it. Everything else passes through, after our own flags, so it wins over our defaults.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from engines.served.environment import common_environment, with_users, words_of
from engines.served.options import threads_per_rank
from engines.served.owned import Owned
from engines.sglang.options import SglangOptions, num_kv_tokens

PLUGIN: Final = Path(__file__).with_name("plugin")
KEYS_FILE: Final = "keys.yaml"  # in the run directory: a command line can be read by all users
_LAYOUT: Final = "the layout decides it (stages, engines.sglang.ranks)"
_SOCKET: Final = "SGLang listens on a private Unix socket"
_ONE: Final = "the daemon runs one replica on one host per SGLang"
_PROCESSES: Final = "SGLang's processes are the daemon's to watch"
_OTHERS: Final = "a draw must depend on seed and position only"
# A share of what is free would be another size at each start: it only bounds, and the number of tokens decides.
_BOUND: Final = "0.9"
OWNED: Final[Mapping[str, str]] = {
    "--model-path": "model",
    "--model": "model",
    "--served-model-name": "served_model_name",
    "--dtype": "dtype",
    "--context-length": "max_model_len",
    "--revision": "revision",
    "--tokenizer-path": "tokenizer",
    "--trust-remote-code": "trust_remote_code",
    "--tensor-parallel-size": "engines.sglang.tensor_parallel",
    "--tp-size": "engines.sglang.tensor_parallel",
    "--page-size": "engines.sglang.kv_block_tokens",
    "--max-total-tokens": "engines.sglang.kv_cache",
    "--mem-fraction-static": "engines.sglang.kv_cache, in bytes",
    "--max-running-requests": "engines.sglang.max_num_seqs",
    "--chunked-prefill-size": "engines.sglang.max_num_batched_tokens",
    "--pipeline-parallel-size": _LAYOUT,
    "--pp-size": _LAYOUT,
    "--device": _LAYOUT,
    "--base-gpu-id": _LAYOUT,
    "--gpu-id-step": _LAYOUT,
    "--config": "write its keys as flags here",
    "--host": _SOCKET,
    "--port": _SOCKET,
    "--grpc-mode": _SOCKET,
    "--grpc-port": _SOCKET,
    "--smg-grpc-mode": _SOCKET,
    "--enable-http2": _SOCKET,
    "--enable-ssl-refresh": _SOCKET,
    "--api-key": "the daemon makes one for each start",
    "--admin-api-key": "the daemon makes one for each start",
    "--nccl-port": "ranks find each other by a file",
    "--dist-init-addr": "ranks find each other by a file",
    "--nnodes": _ONE,
    "--node-rank": _ONE,
    "--data-parallel-size": _ONE,
    "--dp-size": _ONE,
    "--disaggregation-mode": _ONE,
    "--skip-tokenizer-init": _PROCESSES,
    "--tokenizer-worker-num": _PROCESSES,
    "--use-ray": _PROCESSES,
    "--sampling-backend": _OTHERS,
    "--incremental-streaming-output": "the daemon reads it",
}
_OWN_CONTEXT_TOKENS: Final = 6  # which SGLang keeps of its context for itself
_SHORT: Final = {"--tp": "--tp-size", "--pp": "--pp-size", "--dp": "--dp-size"}
_VARIABLES: Final[Mapping[str, str]] = {
    "SGLANG_PP_LAYER_PARTITION": _LAYOUT,
    "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": "ranks find each other by a file",
    "SGLANG_USE_CPU_ENGINE": "devices.kind",
    "CUDA_VISIBLE_DEVICES": _LAYOUT,
    "SGLANG_CPU_OMP_THREADS_BIND": "engines.sglang.threads",
    "OMP_NUM_THREADS": "engines.sglang.threads",
    "PYTHONPATH": "SGLang's environment is its own: install packages there",
    "PYTHONHOME": "SGLang's environment is its own",
    "TMPDIR": "SGLang's temporary files are the daemon's to clean up",
}
OWNED_HERE: Final = Owned(package="sglang", flags=OWNED, short=_SHORT, variables=_VARIABLES)


def command_line(options: SglangOptions, *, counts: Sequence[int], run_dir: Path, port: int) -> list[str]:
    """Return SGLang's command line for ``counts`` decoders on each pipeline rank.

    Args:
        port: A free one. Nothing listens there, but SGLang insists on one.

    Raises:
        UnsupportedByEngine: A flag or variable that the daemon owns is among those passed through.
    """
    OWNED_HERE.refuse(args=options.args, env=options.env)
    flags = {
        "--model-path": options.model_directory,
        "--host": "127.0.0.1",
        "--port": port,
        "--nccl-port": port,
        "--device": "cuda" if options.cuda else "cpu",
        "--pp-size": len(counts),
        "--tp-size": options.tensor_parallel,
        "--dtype": options.dtype,
        "--page-size": options.kv_block_tokens,
        "--max-total-tokens": num_kv_tokens(options),
        "--mem-fraction-static": _BOUND,
        "--max-running-requests": options.max_num_seqs,
        "--chunked-prefill-size": options.max_num_batched_tokens,
        "--sampling-backend": "pytorch",
    }
    if options.max_model_len:
        flags["--context-length"] = context_tokens(options)
    if not options.cuda:
        flags["--attention-backend"] = "torch_native"
    more = [
        # It would go to the port, and a probe of ours says more.
        "--skip-server-warmup",
        # Else schedulers poll for requests all the time.
        "--sleep-on-idle",
        "--incremental-streaming-output",
    ]
    return [
        *(options.python, "-m", "sglang.launch_server", "--config", str(run_dir / KEYS_FILE)),
        *words_of(options, flags, tokenizer_flag="--tokenizer-path", more=more),
    ]


def environment(
    options: SglangOptions,
    *,
    counts: Sequence[int],
    run_dir: Path,
    inherited: Mapping[str, str],
    daemon_prefix: str,
    cores: Sequence[int],
    hf_token: str = "",
) -> dict[str, str]:
    """Return the environment of SGLang's processes: the daemon's without its Python, then ours, then the user's.

    Args:
        inherited: The daemon's environment.
        daemon_prefix: ``sys.prefix`` of the daemon, whose programs are none of SGLang's business.
        cores: The processors that SGLang may run on.
        hf_token: The content of ``hf_token_file``.
    """
    OWNED_HERE.refuse(args=options.args, env=options.env)
    env = common_environment(
        options,
        package="sglang",
        plugin=PLUGIN,
        run_dir=run_dir,
        nice=options.nice,
        inherited=inherited,
        daemon_prefix=daemon_prefix,
        hf_token=hf_token,
    )
    env |= {
        # torch's own rendezvous would listen on all interfaces
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{run_dir / 'rendezvous'}",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if len(counts) > 1:
        env["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, counts))
    if not options.cuda:
        threads = threads_per_rank(options, cores=len(cores))
        env |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "SGLANG_CPU_OMP_THREADS_BIND": thread_bindings(cores, ranks=len(options.device_ids), threads=threads),
            "TORCHDYNAMO_DISABLE": "1",  # small functions of the sampler would be compiled when first used
        }
    if options.max_model_len and options.max_model_len <= options.max_positions < context_tokens(options):
        # no request comes near the tokens that SGLang has beyond the model's positions: the adapter refuses it
        env["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
    return with_users(env, options, plugins="SGLANG_PLUGINS")


def thread_bindings(cores: Sequence[int], *, ranks: int, threads: int) -> str:
    """Return which cores each rank runs on, one field per rank: SGLang for the CPU binds its threads."""
    fields = [
        [cores[(rank * threads + index) % len(cores)] for index in range(min(threads, len(cores)))]
        for rank in range(ranks)
    ]
    return "|".join(",".join(map(str, sorted(set(field)))) for field in fields)


def context_tokens(options: SglangOptions) -> int:
    """Return the context that SGLang has to be told, so that prompt and output may be ``max_model_len`` long."""
    fits = options.max_positions >= options.max_model_len  # else SGLang says that the model has not so many
    return options.max_model_len + (_OWN_CONTEXT_TOKENS if fits else 0)
