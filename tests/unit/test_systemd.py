"""The systemd unit has no key that systemd does not know, and leaves little open."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[2] / "systemd"
UNIT, ENGINE = UNITS / "flexpiped.service", UNITS / "flexpiped-engine@.service"


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def version() -> str:
    """Return which systemd it is, as newer ones may find more."""
    return systemd_analyze("--version").stdout.partition("\n")[0]


@needs_systemd
@pytest.mark.parametrize("name", ["flexpiped.service", "flexpiped-engine.socket", "flexpiped-engine@one.service"])
def test_the_units_are_clean(tmp_path: Path, name: str) -> None:
    """Copies that start ``/bin/true``, as the daemon is not installed here."""
    for unit in (UNIT, ENGINE, UNITS / "flexpiped-engine.socket"):
        text = unit.read_text().replace("/opt/flexpiped/bin/flexpiped", "/bin/true")
        copied = text.replace("/opt/flexpiped/lib/flexpiped/bin/python", "/bin/true")
        (tmp_path / unit.name).write_text(copied)

    ran = systemd_analyze("verify", str(tmp_path / name))

    assert (ran.returncode, ran.stderr) == (0, ""), version()


@needs_systemd
@pytest.mark.parametrize("unit", [UNIT, ENGINE], ids=lambda unit: unit.name)
def test_it_is_hardened(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name.replace("@", "@one")  # of a template it says nothing
    copy.write_text(unit.read_text())

    ran = systemd_analyze("security", "--offline=true", "--no-pager", str(copy))

    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", ran.stdout)
    assert exposure is not None, f"{version()}: {ran.stderr}"
    assert float(exposure[1]) <= 3.0, version()


def test_engines_have_the_sandbox_of_the_daemon() -> None:
    def sandbox(unit: Path) -> list[str]:
        lines = unit.read_text().split("User=flexpiped", 1)[1].partition("[Install]")[0].splitlines()
        return [line for line in lines if line]

    assert sandbox(ENGINE) == sandbox(UNIT)


def test_engines_may_compile_and_reach_gpus_and_no_other_device() -> None:
    lines = [line.partition("=") for line in UNIT.read_text().splitlines()]
    values = {key: [value for name, _, value in lines if name == key] for key, _, _ in lines}

    assert "MemoryDenyWriteExecute" not in values
    assert "PrivateDevices" not in values
    assert values["DevicePolicy"] == ["closed"]
    assert {"char-nvidia rw", "char-nvidia-uvm rw", "char-nvidia-caps rw"} <= set(values["DeviceAllow"])
    assert [each for each in values["DeviceAllow"] if not re.fullmatch(r"char-nvidia(-[a-z]+)? rw", each)] == []
