"""The real ``flexctl topology`` as a process: with a daemon, without one, from files; measuring for real."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexpiped.flexctl.measuring import plan
from tests.support.admin import admin_stand
from tests.support.fake_nvml import discovered
from tests.support.lone_flexctl import alone
from tests.unit.flexctl.test_command_line import flexctl
from topology.device import cpu_devices
from topology.errors import NotMeasured
from topology.machines import machine_names
from topology.topology import HostTopology

pytestmark = pytest.mark.real_loop

ROOT = Path(__file__).parents[3]


async def test_a_daemon_is_asked(tmp_path: Path) -> None:
    async with admin_stand(tmp_path) as stand:
        plain = await flexctl("topology", "--socket", str(stand.socket))
        as_json = await flexctl("topology", "--json", "--socket", str(stand.socket))

    assert (plain.code, plain.err) == (0, "")
    assert "8 CPU devices" in plain.out.splitlines()[0]
    assert "no daemon" not in plain.out
    assert [device["id"] for device in json.loads(as_json.out)["devices"]] == [f"cpu:{index}" for index in range(8)]


async def test_what_is_measured_is_given_to_the_daemon(tmp_path: Path) -> None:
    async with admin_stand(tmp_path, cpu_count=2) as stand:
        ran = await flexctl("topology", "--measure", "--socket", str(stand.socket))
        later = await flexctl("topology", "--socket", str(stand.socket))

    assert (ran.code, ran.err) == (0, "")
    assert f"figuresarekeptin{tmp_path}/links.json" in "".join(ran.out.split())  # however lines are broken
    assert "measured while the daemon runs" in ran.out
    assert "GB/s one way, measured on these devices" in later.out
    assert "ago: shared memory, as KV cache moves between stage workers" in later.out


def test_without_a_daemon_this_host_is_looked_at(tmp_path: Path) -> None:
    ran = alone(tmp_path, "topology")

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "no daemon: looked at this host with default settings" in ran.stdout.splitlines()[0]
    assert max(map(len, ran.stdout.splitlines())) <= 80


async def test_a_daemon_that_is_named_must_be_there(tmp_path: Path) -> None:
    ran = await flexctl("topology", "--socket", str(tmp_path / "none.sock"))

    assert ran.code == 3
    assert "no daemon at" in ran.err


def test_a_snapshot_is_saved_and_shown_again(tmp_path: Path) -> None:
    file = tmp_path / "here.json"

    saved = alone(tmp_path, "topology", "--save", str(file))
    shown = alone(tmp_path, "topology", "--topology", str(file))
    again = alone(tmp_path, "topology", "--topology", str(file), "--json")

    assert f"saved to {file}" in saved.stdout
    assert "8 CPU devices" in shown.stdout
    assert json.loads(again.stdout) == json.loads(file.read_text())


@pytest.mark.parametrize("name", machine_names())
def test_machines_are_shown_by_name(tmp_path: Path, name: str) -> None:
    ran = alone(tmp_path, "topology", "--topology", name)

    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(name)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--topology", "none.json"], 2, "none.json: no such file, and no machine of that name; there are:"),
        (["--topology", "pyproject.toml"], 2, "pyproject.toml: not JSON"),
        (["--topology", "dgx-h100", "--measure"], 2, "--measure measures the devices of this host"),
        (["--save", "/nowhere/x.json"], 1, "/nowhere/x.json: No such file or directory"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    ran = alone(tmp_path, "topology", *arguments)

    assert (ran.returncode, ran.stdout) == (code, "")
    assert ran.stderr.startswith(f"flexctl: {words}")


def test_all_pairs_are_measured_or_neighbours_where_there_are_too_many() -> None:
    few, many, one = (
        HostTopology(host_id="h", devices=cpu_devices(count=count, memory_bytes=1)) for count in (4, 40, 1)
    )

    assert len(plan(few).pairs) == 6
    assert len(plan(many).pairs) == 39
    assert "only neighbours were measured" in plan(many).notes[-1]
    with pytest.raises(NotMeasured, match="no pair"):
        plan(one)


def test_gpus_are_measured_by_uuid_and_instances_left_out(tmp_path: Path) -> None:
    host, _ = discovered(sysfs=tmp_path, count=3, mig=2)

    what = plan(host)

    assert what.environment == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(what.device_ids)}
    assert what.pairs == ((host.gpus[0].uuid, host.gpus[1].uuid),)
    assert "MIG instances are left out" in what.notes[-1]


def test_other_commands_start_without_what_topology_needs() -> None:
    heavy = "('msgspec', 'pynvml', 'numpy')"
    program = f"import sys, flexpiped.flexctl.__main__; print([name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
