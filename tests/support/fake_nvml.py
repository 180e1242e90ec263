"""Programs in a process of their own, whose libnvidia-ml.so.1 is a stand-in built from ``fake_nvml.c``."""

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from topology.snapshot import from_json
from topology.topology import HostTopology

_SOURCE = Path(__file__).with_name("fake_nvml.c")
_ROOT = Path(__file__).parents[2]
_PROGRAM = """
import sys, time
from pathlib import Path
from topology.discovery import CpuBudget, Surroundings, discover
from topology.snapshot import to_json
sysfs, own, times = Path(sys.argv[1]), frozenset(map(int, sys.argv[2].split(","))) if sys.argv[2] else frozenset(), []
for _ in range(int(sys.argv[3])):
    began_s = time.perf_counter()
    host = discover(cpu=CpuBudget(count=2, memory_bytes=1 << 30), own_pids=own,
                    surroundings=Surroundings(host_id="here", sysfs=sysfs, procfs=sysfs / "proc"))
    times.append(time.perf_counter() - began_s)
print(min(times))
print(to_json(host))
"""


_BUILT: dict[str, TemporaryDirectory[str]] = {}  # removed when the interpreter exits


def library(define: str = "") -> Path:
    """Return the folder with a stand-in, built on first use. ``define``: OLD_DRIVER or ANCIENT_DRIVER."""
    if define not in _BUILT:
        _BUILT[define] = TemporaryDirectory(prefix="fake-nvml-")
        target = Path(_BUILT[define].name, "libnvidia-ml.so.1")
        flags = [f"-D{define}"] if define else []
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libnvidia-ml.so.1"]
        subprocess.run([*command, *flags, "-o", target, _SOURCE], check=True)
    return Path(_BUILT[define].name)


def discovered(
    *,
    sysfs: Path,
    define: str = "",
    own_pids: tuple[int, ...] = (),
    repeat: int = 1,
    with_library: bool = True,
    **variables: object,
) -> tuple[HostTopology, float]:
    """Return what discovery finds, and the seconds that the fastest of ``repeat`` runs took.

    Args:
        variables: What the stand-in is told: ``count=16`` is ``FAKE_NVML_COUNT``. Capitals are taken as they are.
    """
    arguments = [str(sysfs), ",".join(map(str, own_pids)), str(repeat)]
    written = run_program(_PROGRAM, *arguments, define=define, with_library=with_library, **variables)
    first, _, rest = written.partition("\n")
    host = from_json(rest)
    assert isinstance(host, HostTopology)
    return host, float(first)


def run_program(program: str, *arguments: str, define: str = "", with_library: bool = True, **variables: object) -> str:
    """Return what a Python program writes where the driver's library is the stand-in; arguments as ``discovered``."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT)}
    if with_library:
        environment["LD_LIBRARY_PATH"] = str(library(define))
    for name, value in variables.items():
        environment[name if name.isupper() else f"FAKE_NVML_{name.upper()}"] = str(value)
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
