"""vLLM's command line and environment."""

from ipaddress import ip_address
from pathlib import Path

import pytest
from msgspec.structs import replace

from engines.errors import UnsupportedByEngine
from engines.served.options import threads_per_rank
from engines.served.plugin_path import SHARED, plugin_path
from engines.vllm.command import OWNED, PLUGIN, command_line, environment, owned_flag, side_channel_address
from engines.vllm.options import VllmOptions, num_kv_blocks

RUN = Path("/run/x")


def flags(options: VllmOptions, counts: tuple[int, ...] = (5, 3)) -> dict[str, str]:
    words = command_line(options, counts=counts, run_dir=RUN)
    return {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def env(options: VllmOptions, counts: tuple[int, ...] = (5, 3), **inherited: str) -> dict[str, str]:
    return environment(
        options,
        counts=counts,
        run_dir=RUN,
        inherited=inherited,
        daemon_prefix="/opt/daemon",
        cores=8,
        hf_token="secret",
    )


def test_the_layout_becomes_ranks_and_a_partition(options: VllmOptions) -> None:
    found = flags(options)
    assert (found["--pipeline-parallel-size"], found["--tensor-parallel-size"]) == ("2", "1")
    assert env(options)["VLLM_PP_LAYER_PARTITION"] == "5,3"
    assert "VLLM_PP_LAYER_PARTITION" not in env(options, (8,))
    assert flags(options, (8,))["--pipeline-parallel-size"] == "1"


def test_the_kv_cache_is_sized_in_bytes_over_all_decoders(options: VllmOptions) -> None:
    found = flags(options)
    assert num_kv_blocks(options) == 100
    assert found["--num-gpu-blocks-override"] == "100"
    assert found["--kv-cache-memory-bytes"] == str(100 * 32 * 512 * 5)  # of the rank with most decoders
    assert "--gpu-memory-utilization" not in found
    assert num_kv_blocks(replace(options, kv_cache_bytes=1)) == 2


def test_common_keys_are_passed_on(options: VllmOptions) -> None:
    found = flags(replace(options, max_model_len=99, revision="main", tokenizer="/tok", dtype="bfloat16"))
    assert (found["--max-model-len"], found["--revision"], found["--tokenizer"]) == ("99", "main", "/tok")
    assert found["--dtype"] == "bfloat16"
    assert flags(replace(options, served_model_name="demo"))["--served-model-name"] == "demo"
    assert flags(options)["--max-model-len"] == "auto"
    assert not {"--revision", "--tokenizer", "--served-model-name", "--trust-remote-code"} & flags(options).keys()
    assert "--trust-remote-code" in flags(replace(options, trust_remote_code=True))


def test_it_is_eager_unless_asked_to_compile(options: VllmOptions) -> None:
    assert "--enforce-eager" in flags(options)
    assert "--enforce-eager" not in flags(replace(options, compile=True))


def test_the_worker_class_is_that_of_the_device(options: VllmOptions) -> None:
    assert flags(options)["--worker-cls"] == "flexpiped_vllm.worker.CPUWorker"
    assert flags(replace(options, cuda=True))["--worker-cls"] == "flexpiped_vllm.worker.GPUWorker"


def test_a_single_rank_runs_in_the_engine_core(options: VllmOptions) -> None:
    one = replace(options, device_ids=("cpu:0",), nice=7)
    assert flags(one, (8,))["--distributed-executor-backend"] == "uni"
    assert env(one, (8,))["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"  # else the CPU platform makes it "mp"
    assert env(one, (8,))["FLEXPIPED_VLLM_NICE"] == "0"
    assert flags(options)["--distributed-executor-backend"] == "mp"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in env(options)
    assert env(replace(options, nice=7))["FLEXPIPED_VLLM_NICE"] == "7"


def test_no_port_is_used(options: VllmOptions) -> None:
    assert flags(options)["--uds"] == "/run/x/http.sock"
    assert "--port" not in flags(options)


def test_each_vllm_has_an_address_of_its_own_for_nixl(options: VllmOptions) -> None:
    addresses = {ip_address(side_channel_address(Path(f"/tmp/run-{number}"))) for number in range(100)}
    assert len(addresses) == 100
    assert all(address.is_loopback for address in addresses)
    name = "VLLM_NIXL_SIDE_CHANNEL_HOST"
    assert env(options)[name] == side_channel_address(RUN)
    assert env(replace(options, env={name: "10.0.0.1"}))[name] == "10.0.0.1"


def test_more_arguments_come_last(options: VllmOptions) -> None:
    words = command_line(replace(options, args=("--seed", "3")), counts=(8,), run_dir=RUN)
    assert words[:5] == ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", options.model_directory]
    assert words[-2:] == ["--seed", "3"]


@pytest.mark.parametrize("flag", sorted(OWNED))
def test_each_flag_of_the_daemon_is_refused_by_name(options: VllmOptions, flag: str) -> None:
    with pytest.raises(UnsupportedByEngine, match=rf"engines\.vllm\.args: {flag} is not yours to set: "):
        command_line(replace(options, args=("--seed", "3", flag, "x")), counts=(8,), run_dir=RUN)


@pytest.mark.parametrize(
    ("argument", "flag"),
    [
        ("--port=80", "--port"),
        ("--max_model_len=80", "--max-model-len"),
        ("-tp", "--tensor-parallel-size"),
        ("-pp=2", "--pipeline-parallel-size"),
        ("--no-enforce-eager", "--enforce-eager"),
        ("--pipeline-par", "--pipeline-parallel-size"),
        ("--seed", None),
        ("--compilation-config.mode=3", None),
        ("--max-logprobs", None),
        ("--enable-lora", None),
        ("-x", None),
        ("value", None),
        ("--", None),
    ],
)
def test_flags_are_known_however_they_are_written(argument: str, flag: str | None) -> None:
    assert owned_flag(argument) == flag


@pytest.mark.parametrize("name", ["CUDA_VISIBLE_DEVICES", "PYTHONPATH", "FLEXPIPED_VLLM_DIR", "VLLM_CPU_KVCACHE_SPACE"])
def test_variables_of_the_daemon_are_refused_by_name(options: VllmOptions, name: str) -> None:
    with pytest.raises(UnsupportedByEngine, match=rf"engines\.vllm\.env: {name} is not yours to set: "):
        env(replace(options, env={name: "1"}))


def test_nothing_of_the_daemons_python_is_inherited(options: VllmOptions) -> None:
    found = env(
        options,
        PATH="/opt/daemon/bin:/usr/bin",
        PYTHONPATH="/work",
        PYTHONHOME="/x",
        VIRTUAL_ENV="/opt/daemon",
        NOTIFY_SOCKET="/run/notify",
        VLLM_CPU_KVCACHE_SPACE="40",
        HOME="/root",
        LANG="C.UTF-8",
    )
    assert found["PATH"] == "/opt/vllm/bin:/usr/bin"
    assert found["PYTHONPATH"] == plugin_path(PLUGIN) == f"{PLUGIN}:{SHARED}"
    assert (found["HOME"], found["LANG"]) == ("/root", "C.UTF-8")
    assert not {"PYTHONHOME", "VIRTUAL_ENV", "NOTIFY_SOCKET", "VLLM_CPU_KVCACHE_SPACE"} & found.keys()


def test_the_plugin_is_named_beside_the_users(options: VllmOptions) -> None:
    assert env(options)["VLLM_PLUGINS"] == "flexpiped"
    assert env(replace(options, env={"VLLM_PLUGINS": "theirs,flexpiped"}))["VLLM_PLUGINS"] == "flexpiped,theirs"
    assert env(replace(options, env={"A": "1", "VLLM_NO_USAGE_STATS": "0"}))["VLLM_NO_USAGE_STATS"] == "0"


def test_the_hub_is_only_asked_for_a_model_that_is_not_here(options: VllmOptions) -> None:
    assert env(options)["HF_HUB_OFFLINE"] == "1"
    hub = env(replace(options, model_directory="org/name"))
    assert "HF_HUB_OFFLINE" not in hub
    assert hub["HF_TOKEN"] == "secret"


def test_threads_are_shared_by_the_ranks(options: VllmOptions) -> None:
    assert env(options)["OMP_NUM_THREADS"] == "4"
    assert env(options)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert threads_per_rank(options, cores=1) == 1
    assert threads_per_rank(replace(options, threads=6), cores=1) == 3


def test_gpus_are_named_by_uuid_in_rank_order(options: VllmOptions) -> None:
    found = env(replace(options, cuda=True, device_ids=("GPU-b", "GPU-a")))
    assert found["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert "OMP_NUM_THREADS" not in found


def test_a_service_without_a_home_has_a_cache(options: VllmOptions) -> None:
    assert env(options, CACHE_DIRECTORY="/var/cache/flexpiped")["VLLM_CACHE_ROOT"] == "/var/cache/flexpiped/vllm"
    assert "VLLM_CACHE_ROOT" not in env(options)


def test_what_torch_compiles_in_eager_mode_is_kept(options: VllmOptions) -> None:
    name, kept = "TORCHINDUCTOR_CACHE_DIR", "vllm/eager_inductor_cache"
    assert env(options, HOME="/root")[name] == f"/root/.cache/{kept}"
    assert env(options, HOME="/root", XDG_CACHE_HOME="/cache")[name] == f"/cache/{kept}"
    assert env(options, CACHE_DIRECTORY="/var/cache/flexpiped")[name] == f"/var/cache/flexpiped/{kept}"
    assert name not in env(options)
    assert name not in env(replace(options, compile=True), HOME="/root")  # vLLM has a place of its own then
    assert env(replace(options, env={name: "/mine"}), HOME="/root")[name] == "/mine"


def test_the_plugin_folder_can_be_found_by_its_entry_points() -> None:
    from importlib.metadata import distributions

    (found,) = distributions(path=[str(PLUGIN)])
    named = {(point.group, point.name): point.value for point in found.entry_points}
    assert named == {
        ("vllm.general_plugins", "flexpiped"): "flexpiped_vllm.registration:register",
        ("vllm.endpoint_plugins", "flexpiped"): "flexpiped_vllm.endpoint:EndpointPlugin",
    }
    for value in named.values():
        assert (PLUGIN / f"{value.partition(':')[0].replace('.', '/')}.py").is_file()
