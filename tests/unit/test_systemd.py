"""The systemd unit has no key that systemd does not know, and leaves little open."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "flexpiped.service"


needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@needs_systemd
def test_the_unit_is_clean(tmp_path: Path) -> None:
    """A copy that starts ``/bin/true``, as the daemon is not installed here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/flexpiped/bin/flexpiped", "/bin/true"))

    ran = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")


@needs_systemd
def test_it_is_hardened() -> None:
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)

    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", ran.stdout)
    assert exposure is not None, ran.stderr
    assert float(exposure[1]) <= 3.0


def test_engines_may_compile_and_reach_gpus() -> None:
    keys = [line.partition("=")[0] for line in UNIT.read_text().splitlines()]

    assert "MemoryDenyWriteExecute" not in keys
    assert "PrivateDevices" not in keys
    assert "DeviceAllow" in keys
