"""Where the output of ``flexctl`` goes: full disks, closed pipes, encodings; as a process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
_SCHEMA = (sys.executable, "-m", "flexpiped.flexctl", "config", "schema")


def shell(command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command, "bash", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_is_told_in_one_line() -> None:
    ran = shell('"$@" > /dev/full', *_SCHEMA)

    assert ran.returncode == 1
    assert ran.stderr == "flexctl: the output cannot be written: No space left on device\n"


def test_a_reader_that_leaves_is_no_failure() -> None:
    ran = shell('"$@" | true; exit "${PIPESTATUS[0]}"', *_SCHEMA)

    assert (ran.returncode, ran.stderr) == (0, "")


def test_who_has_closed_the_output_wants_none() -> None:
    ran = shell('"$@" >&-', *_SCHEMA)

    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    named = tmp_path / "caf\u00e9.toml"
    named.write_text("stages = 2\n", encoding="utf-8")

    ran = shell('"$@"', *_SCHEMA[:-1], "check", str(named), PYTHONIOENCODING="ascii")

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{tmp_path}/caf\\xe9.toml: ok\n", "")
