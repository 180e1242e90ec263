"""What of the daemon's environment its engines get. Pure."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

_STAYS: Final = ("PYTHON", "VLLM_", "SGLANG_", "FLEXPIPED_", "VIRTUAL_ENV", "CONDA_", "OMP_", "LISTEN_")
_STAYS_NAMES: Final = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "CUDA_VISIBLE_DEVICES", "TMPDIR", "PORT", "HOST_IP"}
)


def inherited_environment(inherited: Mapping[str, str], *, python: str, daemon_prefix: str) -> dict[str, str]:
    """Return the daemon's environment without its Python, and with the engine's programs first on the path.

    Args:
        daemon_prefix: ``sys.prefix`` of the daemon, whose programs are none of the engine's business.
    """
    kept = {name: value for name, value in inherited.items() if not _stays(name)}
    own = str(Path(daemon_prefix) / "bin")
    others = [place for place in inherited.get("PATH", "").split(os.pathsep) if place and place != own]
    return kept | {"PATH": os.pathsep.join([str(Path(python).parent), *others])}


def _stays(name: str) -> bool:
    """Return whether a variable of the daemon's stays with the daemon."""
    return name.startswith(_STAYS) or name in _STAYS_NAMES
