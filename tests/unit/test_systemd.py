"""The systemd unit has no key that systemd does not know, and leaves little open."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "flexpiped.service"


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def systemd_analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


def version() -> str:
    """Return which systemd it is, as newer ones may find more."""
    return systemd_analyze("--version").stdout.partition("\n")[0]


@needs_systemd
def test_the_unit_is_clean(tmp_path: Path) -> None:
    """A copy that starts ``/bin/true``, as the daemon is not installed here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/flexpiped/bin/flexpiped", "/bin/true"))

    ran = systemd_analyze("verify", str(copy))

    assert (ran.returncode, ran.stderr) == (0, ""), version()


@needs_systemd
def test_it_is_hardened() -> None:
    ran = systemd_analyze("security", "--offline=true", "--no-pager", str(UNIT))

    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", ran.stdout)
    assert exposure is not None, f"{version()}: {ran.stderr}"
    assert float(exposure[1]) <= 3.0, version()


def test_engines_may_compile_and_reach_gpus() -> None:
    keys = [line.partition("=")[0] for line in UNIT.read_text().splitlines()]

    assert "MemoryDenyWriteExecute" not in keys
    assert "PrivateDevices" not in keys
    assert "DeviceAllow" in keys
