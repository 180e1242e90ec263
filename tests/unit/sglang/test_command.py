"""SGLang's command line and environment."""

from pathlib import Path

import pytest
from msgspec.structs import replace

from engines.errors import UnsupportedByEngine
from engines.served.plugin_path import plugin_path
from engines.sglang.command import OWNED, PLUGIN, command_line, environment, thread_bindings
from engines.sglang.options import SglangOptions, num_kv_tokens

RUN = Path("/tmp/run")


@pytest.fixture
def options(tmp_path: Path) -> SglangOptions:
    return SglangOptions(
        python="/opt/sglang/bin/python",
        model_directory=str(tmp_path),
        device_ids=("cpu:0", "cpu:1"),
        num_decoders=8,
        kv_bytes_per_token=512,
        kv_cache_bytes=8 * 512 * 1000 + 1,
        dtype="float32",
    )


def flags_of(options: SglangOptions) -> dict[str, str]:
    words = command_line(options, counts=(5, 3), run_dir=RUN, port=31000)
    return {word: words[index + 1] for index, word in enumerate(words[:-1]) if word.startswith("--")}


def env(options: SglangOptions, **inherited: str) -> dict[str, str]:
    return environment(
        options,
        counts=(5, 3),
        run_dir=RUN,
        inherited=inherited,
        daemon_prefix="/opt/daemon",
        cores=(0, 1, 2, 3),
        hf_token="secret",
    )


def test_the_kv_cache_is_told_in_tokens(options: SglangOptions) -> None:
    assert num_kv_tokens(options) == 1000
    assert num_kv_tokens(replace(options, kv_block_tokens=16)) == 992
    assert flags_of(options)["--max-total-tokens"] == "1000"


def test_the_layout_decides_ranks_and_their_layers(options: SglangOptions) -> None:
    assert (flags_of(options)["--pp-size"], flags_of(options)["--tp-size"]) == ("2", "1")
    assert env(options)["SGLANG_PP_LAYER_PARTITION"] == "5,3"


def test_keys_are_in_no_command_line(options: SglangOptions) -> None:
    flags = flags_of(options)
    assert flags["--config"] == "/tmp/run/keys.yaml"
    assert not {"--api-key", "--admin-api-key"} & flags.keys()


def test_ranks_find_each_other_by_a_file(options: SglangOptions) -> None:
    found = env(options)
    assert found["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == "file:///tmp/run/rendezvous"


@pytest.mark.parametrize("cuda", [False, True])
def test_nothing_of_theirs_is_to_be_reached_from_other_hosts(options: SglangOptions, cuda: bool) -> None:
    """Unless somebody says so in the configuration: what the host's environment says is of other jobs."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    asked = replace(options, cuda=cuda, device_ids=("GPU-b", "GPU-a") if cuda else options.device_ids)
    found = env(asked, NCCL_SOCKET_IFNAME="eth0")
    assert [found[name] for name in names] == ["lo", "lo"]
    found = env(replace(asked, env={"NCCL_SOCKET_IFNAME": "eth1"}))
    assert [found[name] for name in names] == ["lo", "eth1"]


@pytest.mark.parametrize("flag", sorted(OWNED))
def test_each_flag_of_the_daemons_is_refused_with_what_says_it(options: SglangOptions, flag: str) -> None:
    with pytest.raises(UnsupportedByEngine) as caught:
        command_line(replace(options, args=(f"{flag}=1",)), counts=(5, 3), run_dir=RUN, port=31000)
    assert OWNED[flag] in str(caught.value)
    assert "engines.sglang.args" in str(caught.value)


def test_a_beginning_of_a_flag_is_refused_and_others_pass(options: SglangOptions) -> None:
    with pytest.raises(UnsupportedByEngine, match="max_total is not yours to set"):
        command_line(replace(options, args=("--max_total", "7")), counts=(8,), run_dir=RUN, port=31000)
    passed = ("--schedule-policy", "lpm")
    assert tuple(command_line(replace(options, args=passed), counts=(8,), run_dir=RUN, port=31000)[-2:]) == passed


def test_variables_of_the_daemons_are_refused(options: SglangOptions) -> None:
    for name in ("SGLANG_PP_LAYER_PARTITION", "FLEXPIPED_SGLANG_DIR", "PYTHONPATH"):
        with pytest.raises(UnsupportedByEngine, match=rf"engines\.sglang\.env: {name} is not yours"):
            env(replace(options, env={name: "1"}))


def test_the_environment_is_its_own(options: SglangOptions) -> None:
    found = env(options, PATH="/opt/daemon/bin:/usr/bin", PYTHONPATH="/x", SGLANG_PORT="1", HOME="/root")
    assert found["PATH"] == "/opt/sglang/bin:/usr/bin"
    assert found["PYTHONPATH"] == plugin_path(PLUGIN)
    assert (found["HOME"], found["HF_HUB_OFFLINE"], found["HF_TOKEN"]) == ("/root", "1", "secret")
    assert "SGLANG_PORT" not in found


def test_the_plugin_is_named_beside_the_users(options: SglangOptions) -> None:
    assert env(options)["SGLANG_PLUGINS"] == "flexpiped"
    assert env(replace(options, env={"SGLANG_PLUGINS": "theirs"}))["SGLANG_PLUGINS"] == "flexpiped,theirs"


def test_threads_are_shared_by_the_ranks(options: SglangOptions) -> None:
    assert env(options)["OMP_NUM_THREADS"] == "2"
    assert env(options)["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert thread_bindings((4, 7), ranks=4, threads=1) == "4|7|4|7"


def test_gpus_are_named_by_uuid_in_rank_order(options: SglangOptions) -> None:
    gpus = replace(options, cuda=True, device_ids=("GPU-b", "GPU-a"))
    assert env(gpus)["CUDA_VISIBLE_DEVICES"] == "GPU-b,GPU-a"
    assert "SGLANG_USE_CPU_ENGINE" not in env(gpus)
    assert flags_of(gpus)["--device"] == "cuda"
    assert "--attention-backend" not in flags_of(gpus)


@pytest.mark.parametrize(
    ("max_model_len", "max_positions", "told", "beyond"),
    [
        (0, 2048, None, False),  # as the model says
        (100, 2048, "106", False),
        (2048, 2048, "2054", True),  # beyond the model's positions, where no request comes
        (4096, 2048, "4096", False),  # SGLang refuses it, in its own words
    ],
)
def test_sglang_gets_what_it_keeps_of_the_context_on_top(
    options: SglangOptions, max_model_len: int, max_positions: int, told: str | None, beyond: bool
) -> None:
    asked = replace(options, max_model_len=max_model_len, max_positions=max_positions)
    assert flags_of(asked).get("--context-length") == told
    assert ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN" in env(asked)) is beyond
