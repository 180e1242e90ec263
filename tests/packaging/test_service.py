"""The Debian package in a machine that a real systemd has booted: installed, run as a service, upgraded, removed.

One machine for all of it, so the tests stand in the order in which an operator does these things.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machine import ENGINE_PYTHON, Machine, machine_in, missing_tools, until

ROOT = Path(__file__).parents[2]
CONFIG = "/etc/flexpiped/flexpiped.toml"
START_DEADLINE_S = 180.0
DEMO_MODEL = "/usr/share/flexpiped/demo-model"
SERVES = f'engine = "native"\nstages = 2\n[engines.native]\npython = "{ENGINE_PYTHON}"\n'
# As unattended-upgrades does it: an operator's configuration stays, and nobody answers questions.
UNATTENDED = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-yo", "Dpkg::Options::=--force-confold", "install")
ASK = """
import json, sys, urllib.request
body = json.dumps({"prompt": "Once", "max_tokens": 20, "temperature": 0}).encode()
ask = urllib.request.Request("http://127.0.0.1:8100/v1/completions", body, {"content-type": "application/json"})
print(json.load(urllib.request.urlopen(ask))["choices"][0]["text"])
"""

STREAM = """
import openai
client = openai.OpenAI(base_url="http://127.0.0.1:8100/v1", api_key="none")
for chunk in client.completions.create(model="demo-model", prompt="Once", max_tokens=20, temperature=0, stream=True):
    print(chunk.choices[0].text, end="", flush=True)
"""
LOOK = """
import sys, urllib.request
path, wanted = sys.argv[1:]
for line in urllib.request.urlopen("http://127.0.0.1:8100" + path, timeout=20):
    if wanted in line.decode():
        break
else:
    sys.exit(f"{path} does not say {wanted}")
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.engine,
    pytest.mark.skipif(os.getuid() != 0, reason="booting a machine needs root"),
    pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {', '.join(missing_tools())}"),
]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    built = subprocess.run([ROOT / "packaging" / "build_deb.sh", out], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return Path(built.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def newer(package: Path) -> Path:
    """Return another version of the package, which comes with another configuration."""
    unpacked, out = package.with_name("newer"), package.with_name("newer.deb")
    subprocess.run(["dpkg-deb", "--raw-extract", package, unpacked], check=True)
    for file, line, instead in (
        ("DEBIAN/control", r"^Version: (.*)$", r"Version: \1+newer"),
        (CONFIG.removeprefix("/"), r'^#mode = "off"$', '#mode = "dry-run"'),
    ):
        text, count = re.subn(line, instead, (unpacked / file).read_text(), flags=re.MULTILINE)
        assert count == 1
        (unpacked / file).write_text(text)
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Zzstd", "-z1", "--build", unpacked, out], check=True)
    return out


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, package: Path) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    with machine_in(folder, bind=[f"--bind-ro={package.parent}:/srv/dist"]) as machine:
        machine.boot()
        machine.do("dpkg", "--install", f"/srv/dist/{package.name}")
        yield machine


def started(machine: Machine) -> None:
    """Start the service; where it does not come up, say what it says."""
    done = machine.run("systemctl", "start", "flexpiped")
    assert done.returncode == 0, machine.last_words()


def shown(machine: Machine, name: str) -> str:
    return machine.do("systemctl", "show", "flexpiped", "--property", name, "--value").strip()


def journal(machine: Machine) -> list[dict[str, object]]:
    """Return the log events of the service, oldest first."""
    lines = machine.do("journalctl", "--unit", "flexpiped", "--output", "cat", "--no-pager").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def events(machine: Machine) -> list[object]:
    return [entry["event"] for entry in journal(machine)]


def completion(machine: Machine) -> str:
    return machine.do("python3", "-c", ASK)


def test_the_package_is_there_and_nothing_runs_before_it_is_configured(machine: Machine) -> None:
    assert machine.do("flexctl", "--version").startswith("flexctl ")
    assert machine.do("find", "/usr/lib/flexpiped", "-path", "*/site-packages/torch*") == ""  # engines have their own
    assert shown(machine, "ActiveState") == "inactive"
    assert machine.do("stat", "-c", "%a %U %G", "/etc/flexpiped").split() == ["750", "root", "flexpiped"]
    assert machine.do("stat", "-c", "%a %U %G", CONFIG).split() == ["640", "root", "flexpiped"]
    assert machine.run("systemd-analyze", "verify", "flexpiped.service").stderr == ""


def test_without_an_engine_it_says_what_to_do(machine: Machine) -> None:
    assert machine.run("systemctl", "start", "flexpiped").returncode != 0
    until(lambda: "daemon start failed" in events(machine), deadline_s=START_DEADLINE_S)

    reasons = [entry["reason"] for entry in journal(machine) if entry["event"] == "daemon start failed"]
    assert "set python under [engines.native]" in str(reasons[0])
    machine.do("systemctl", "stop", "flexpiped")


def test_it_starts_and_serves(machine: Machine) -> None:
    machine.write(CONFIG, SERVES)
    assert machine.do("flexctl", "config", "check", CONFIG) == f"{CONFIG}: ok\n"

    started(machine)

    assert shown(machine, "StatusText") == "serving demo-model, 8 decoder layers in 2 stages"
    assert completion(machine).strip()
    assert machine.do("flexctl", "status").startswith("demo-model   native   epoch 0   2 stages")
    assert machine.do("systemctl", "show", "flexpiped", "--property", "User", "--value").strip() == "flexpiped"
    assert "daemon ready" in events(machine)


def test_systemd_knows_every_key_of_the_units_and_leaves_little_open(machine: Machine) -> None:
    machine.do("systemctl", "daemon-reload")
    for unit in ("flexpiped.service", "flexpiped-engine.socket", "flexpiped-engine@one.service"):
        assert machine.run("systemd-analyze", "verify", unit).stderr == ""
    said = machine.do("journalctl", "--boot", "_PID=1", "--output", "cat", "--no-pager")
    assert [line for line in said.splitlines() if "flexpiped" in line and re.search("nknown|ignoring", line)] == []
    for unit in ("flexpiped.service", "flexpiped-engine@one.service"):
        told = machine.do("systemd-analyze", "security", "--no-pager", unit)
        exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", told)
        assert exposure is not None
        assert float(exposure[1]) <= 3.0


def test_an_operator_sees_it_at_work(machine: Machine) -> None:
    """An openai client that streams, the dashboard and ``flexctl top``, as the README says."""
    assert machine.do(ENGINE_PYTHON, "-c", STREAM).strip() == completion(machine).strip()

    machine.do("python3", "-c", LOOK, "/", "<title>flexpiped")
    machine.do("python3", "-c", LOOK, "/dashboard/stream", "event: status")
    top = "TERM=xterm timeout --foreground -s INT -k 2 5 flexctl top"
    screen = machine.run("script", "--quiet", "--command", top, "/dev/null").stdout
    assert "demo-model" in screen
    assert "cpu:1" in screen


def test_a_reload_applies_what_it_can_and_a_wrong_one_changes_nothing(machine: Machine) -> None:
    before = machine.do("cat", CONFIG)
    machine.write(CONFIG, before + "[admission]\nmax_requests_queued = 7\n")
    assert "admission.max_requests_queued  256 -> 7" in machine.do("flexctl", "config", "diff")
    machine.do("systemctl", "reload", "flexpiped")
    until(lambda: "configuration changed and applied" in events(machine), deadline_s=START_DEADLINE_S)
    assert "admission.max_requests_queued = 7" in machine.do("flexctl", "config", "show")

    machine.write(CONFIG, before + "[admission]\nmax_requests_queued = -1\n")
    assert machine.run("systemctl", "reload", "flexpiped").returncode != 0
    machine.do("systemctl", "kill", "--kill-who=main", "--signal=HUP", "flexpiped")  # past the check of the unit
    until(lambda: any("rejected" in str(event) for event in events(machine)), deadline_s=START_DEADLINE_S)
    assert "admission.max_requests_queued = 7" in machine.do("flexctl", "config", "show")
    assert shown(machine, "ActiveState") == "active"
    machine.write(CONFIG, before)


def test_killed_it_comes_back_with_the_layout_last_asked_for_and_nothing_is_left_behind(machine: Machine) -> None:
    machine.do("flexctl", "rebalance", "--stages", "4", "--wait")
    killed = shown(machine, "MainPID")
    group = processes(machine)
    machine.do("kill", "-9", killed)

    until(lambda: came_back(machine, instead_of=killed), deadline_s=START_DEADLINE_S)

    assert machine.do("flexctl", "status").startswith("demo-model   native   epoch 0   4 stages")
    assert not group & processes(machine)
    assert completion(machine).strip()


def processes(machine: Machine) -> set[str]:
    """Return all that run as the daemon's user."""
    return set(machine.do("ps", "-u", "flexpiped", "-o", "pid=").split())


def came_back(machine: Machine, *, instead_of: str) -> bool:
    return shown(machine, "ActiveState") == "active" and shown(machine, "MainPID") not in ("0", instead_of)


def hang(machine: Machine) -> str:
    """Have the service hang until the watchdog has brought it back, and return the journal.

    The time is shorter than the unit's own, with which this would take a minute and more. What comes later has that
    again: a machine that other work keeps busy may hold a daemon up for so long.
    """
    shorter = "/run/systemd/system/flexpiped.service.d/watchdog.conf"
    machine.write(shorter, "[Service]\nWatchdogSec=4\n")
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "restart", "flexpiped")
    hung = shown(machine, "MainPID")
    machine.do("kill", "-STOP", hung)
    until(lambda: came_back(machine, instead_of=hung), deadline_s=START_DEADLINE_S)
    machine.do("rm", shorter)
    machine.do("systemctl", "daemon-reload")
    return machine.do("journalctl", "--unit", "flexpiped", "--output", "cat", "--no-pager")


def test_the_watchdog_ends_one_that_hangs(machine: Machine) -> None:
    assert "Watchdog timeout (limit 4s)!" in hang(machine)
    assert completion(machine).strip()


def test_an_unattended_upgrade_keeps_the_configuration_and_restarts_it(machine: Machine, newer: Path) -> None:
    machine.write(CONFIG, SERVES)
    started(machine)
    before, old = shown(machine, "MainPID"), version_in(machine)

    said = machine.do("timeout", "300", *UNATTENDED, f"/srv/dist/{newer.name}")

    assert version_in(machine) == f"{old}+newer"
    assert came_back(machine, instead_of=before), said + machine.last_words()
    assert machine.do("cat", CONFIG) == SERVES
    assert '#mode = "dry-run"\n' in machine.do("cat", f"{CONFIG}.dpkg-dist")  # what the new one would have had
    assert completion(machine).strip()


def version_in(machine: Machine) -> str:
    return machine.do("dpkg-query", "--show", "--showformat=${Version}", "flexpiped")


def test_enabled_it_is_there_after_a_reboot(machine: Machine) -> None:
    machine.do("systemctl", "enable", "flexpiped")
    machine.power_off()
    machine.boot()

    until(lambda: shown(machine, "ActiveState") == "active", deadline_s=START_DEADLINE_S)
    assert completion(machine).strip()


@pytest.mark.parametrize(
    ("model", "place", "owner"),
    [
        ("acme/cached", "/var/cache/flexpiped/huggingface/hub/models--acme--cached/snapshots/1f0e", "flexpiped"),
        ("/home/alice/mine", "/home/alice/mine", "root"),
    ],
    ids=["of the hub, in the cache", "in a home directory"],
)
def test_a_model_is_read_from_where_operators_have_it(machine: Machine, model: str, place: str, owner: str) -> None:
    """The hub cannot be reached from there, so what is served as one of its models is from the cache."""
    before = machine.do("cat", CONFIG)
    machine.do("sh", "-c", f"mkdir -p {place} && cp {DEMO_MODEL}/* {place}")
    if "snapshots" in place:
        machine.write(f"{place}/../../refs/main", "1f0e")
    machine.do("chown", "-R", owner, place.split("/models--")[0])
    machine.write(CONFIG, f'model = "{model}"\n{before}')

    machine.do("systemctl", "restart", "flexpiped")

    assert shown(machine, "StatusText").startswith(f"serving {Path(model).name}, 8 decoder layers")
    assert completion(machine).strip()
    machine.write(CONFIG, before)


def test_it_stops_in_good_order(machine: Machine) -> None:
    machine.do("systemctl", "stop", "flexpiped")

    assert (shown(machine, "Result"), shown(machine, "ExecMainStatus")) == ("success", "0")
    assert events(machine)[-1] == "daemon stopped"
    assert machine.run("test", "-e", "/run/flexpiped").returncode != 0
    assert machine.run("pgrep", "-u", "flexpiped").stdout == ""


def test_removing_keeps_the_configuration_and_purging_does_not(machine: Machine) -> None:
    started(machine)
    machine.do("dpkg", "--remove", "flexpiped")
    assert machine.run("test", "-e", CONFIG).returncode == 0
    assert machine.run("test", "-e", "/usr/lib/flexpiped").returncode != 0
    assert machine.run("systemctl", "is-active", "flexpiped").stdout.strip() == "inactive"

    machine.do("dpkg", "--purge", "flexpiped")
    left = machine.do(
        "sh", "-c", "ls -d /etc/flexpiped /var/lib/flexpiped /usr/share/doc/flexpiped 2>/dev/null || true"
    )
    assert left == ""
