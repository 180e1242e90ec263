"""The environment of an engine's processes, as far as it is the same for every engine. Pure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.served.inherited import inherited_environment
from engines.served.options import ServedOptions
from engines.served.plugin_path import plugin_path
from topology.cuda_order import visible_environment


def common_environment(
    options: ServedOptions,
    *,
    package: str,
    plugin: Path,
    run_dir: Path,
    nice: int,
    inherited: Mapping[str, str],
    daemon_prefix: str,
    hf_token: str,
) -> dict[str, str]:
    """Return the daemon's environment without its Python, then what our plugin is told, and which GPUs there are.

    Args:
        package: The engine's, which names the plugin's variables.
        plugin: The folder of our plugin.
        nice: Of the processes that compute.
        inherited: The daemon's environment.
        daemon_prefix: ``sys.prefix`` of the daemon, whose programs are none of the engine's business.
        hf_token: The content of ``hf_token_file``.
    """
    told = f"FLEXPIPED_{package.upper()}"
    env = inherited_environment(inherited, python=options.python, daemon_prefix=daemon_prefix)
    env |= {
        "PYTHONPATH": plugin_path(plugin),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(run_dir),
        f"{told}_DIR": str(run_dir),
        f"{told}_NICE": str(nice),
        f"{told}_SLICE_BYTES": str(options.slice_bytes),
        "TOKENIZERS_PARALLELISM": "false",
        # All ranks are on this host: they need not listen where others reach them.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    if options.parameters:
        of = kept_under(package, options.model_directory)
        env |= {f"{told}_PARAMETERS": options.parameters, f"{told}_PARAMETERS_OF": of}
    if options.cuda:
        env |= visible_environment(options.device_ids)
    if Path(options.model_directory).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
    if hf_token:
        env["HF_TOKEN"] = hf_token
    return env


def kept_under(package: str, model_directory: str) -> str:
    """Return by what the keeper of parameters knows an engine with a model: each has layers in a form of its own."""
    return f"{package} {model_directory}"


def with_users(env: Mapping[str, str], options: ServedOptions, *, plugins: str) -> dict[str, str]:
    """Return ``env`` with what users add, who may name plugins of theirs beside ours in the variable ``plugins``."""
    theirs = [name for name in options.env.get(plugins, "").split(",") if name]
    return {**env, **options.env, plugins: ",".join(dict.fromkeys(["flexpiped", *theirs]))}


def words_of(
    options: ServedOptions, flags: Mapping[str, object], *, tokenizer_flag: str, more: Sequence[str]
) -> list[str]:
    """Return ``flags`` with their values as words of a command line, then what every engine is told of the model.

    Args:
        tokenizer_flag: The engine's own name for it.
        more: The engine's further words; the user's follow them and so win.
    """
    texts = {
        "--served-model-name": options.served_model_name,
        "--revision": options.revision,
        tokenizer_flag: options.tokenizer,
    }
    return [
        *(word for flag, value in flags.items() for word in (flag, str(value))),
        *(word for flag, value in texts.items() if value for word in (flag, value)),
        *(["--trust-remote-code"] if options.trust_remote_code else []),
        *more,
        *options.args,
    ]
