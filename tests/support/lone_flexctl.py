"""The real ``flexctl`` as a process where no daemon is, with a state directory of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def alone(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run flexctl; warnings are errors, as in every test."""
    environment = {
        "PATH": os.environ["PATH"],
        "XDG_RUNTIME_DIR": str(home / "run"),
        "XDG_STATE_HOME": str(home / "state"),
        "PYTHONWARNINGS": "error",
    }
    command = [sys.executable, "-m", "flexpiped.flexctl", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
