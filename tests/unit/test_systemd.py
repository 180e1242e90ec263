"""The systemd unit has no key that systemd does not know."""

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "systemd" / "flexpiped.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_clean(tmp_path: Path) -> None:
    """A copy that starts ``/bin/true``, as the daemon is not installed here."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/opt/flexpiped/bin/flexpiped", "/bin/true"))

    ran = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, "")
