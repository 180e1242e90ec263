"""A Debian of its own, booted by a real systemd in a container: what a service does there it does on a host.

The base is made by debootstrap once and kept in ``~/.cache/flexpiped``; a machine writes into a layer above it.
"""

import fcntl
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

RELEASE = "bookworm"
CACHE = Path.home() / ".cache" / "flexpiped"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "procps")
TOOLS = ("systemd-nspawn", "debootstrap", "nsenter", "dpkg-deb")
# What vLLM's build for the CPU needs of the host besides its environment (Debian's libnuma1); the base is without it.
NUMA = "/usr/lib/x86_64-linux-gnu/libnuma.so.1"
ENGINE_PYTHON = "/srv/engine/bin/python"  # of the environment of these tests, inside
_BOOT_DEADLINE_S = 180.0  # with the services that are enabled, on a machine that other work keeps busy
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing_tools() -> list[str]:
    """Return what has to be installed here to boot a machine."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def ensure_base(*more: str) -> Path:
    """Return a base that has ``more`` packages, made if there is none: a minute or two, and 300 MB or more."""
    base = CACHE / "-".join((f"debian-{RELEASE}", *more))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{base.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "usr/bin/systemctl").exists():
            shutil.rmtree(base, ignore_errors=True)
            made = CACHE / f"{base.name}.part"
            shutil.rmtree(made, ignore_errors=True)
            included = ",".join((*PACKAGES, *more))
            done = _run(["debootstrap", "--variant=minbase", f"--include={included}", RELEASE, str(made)])
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (made / "root").chmod(0o755)  # a Python of root's own is bound there
            made.rename(base)
    return base


class Machine:
    """A machine that is off. What it writes while it runs is in ``folder``, over reboots."""

    def __init__(self, folder: Path, *, bind: Sequence[str] = ()) -> None:
        self.root = folder / "root"  # its files, seen from outside
        self._log = folder / "console.log"
        self._bind = [f"--bind-ro={sys.prefix}:/srv/engine", f"--bind-ro={sys.base_prefix}", *bind]
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def boot(self) -> None:
        """Return when everything that is enabled has started, or has failed to."""
        with self._log.open("ab") as log:
            self._nspawn = subprocess.Popen(
                [
                    *("systemd-nspawn", "--boot", "--quiet", "--directory", str(self.root)),
                    *("--machine", f"flexpiped-{self.root.parent.name}"[:60], "--register=no", "--keep-unit"),
                    *("--console=pipe", "--private-network", *self._bind),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self._init() != 0, deadline_s=_BOOT_DEADLINE_S)
        self._leader = self._init()
        until(lambda: self.state() in ("running", "degraded"), deadline_s=_BOOT_DEADLINE_S, says=self.last_words)

    def power_off(self) -> None:
        """Shut down in good order: services are stopped."""
        assert self._nspawn is not None
        self.run("systemctl", "poweroff", "--no-block")
        self._nspawn.wait(timeout=_BOOT_DEADLINE_S)
        self._nspawn = None

    def destroy(self) -> None:
        """Pull the plug, if it runs."""
        if self._nspawn is not None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(timeout=_BOOT_DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._nspawn = None

    @property
    def leader(self) -> int:
        """Its first process, by the pid that it has here."""
        return self._leader

    def last_words(self) -> str:
        """Return what is still to be started, and the end of the journal."""
        journal = self.run("journalctl", "--output", "cat", "--no-pager", "--lines", "60").stdout
        return self.run("systemctl", "list-jobs", "--no-pager").stdout + journal

    def state(self) -> str:
        return self.run("systemctl", "is-system-running").stdout.strip()

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root."""
        return _run(self.inside(*command), stdin=stdin)

    def inside(self, *command: str) -> list[str]:
        """Return what runs a command inside, as root and with nothing of this environment."""
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-p", "-n", "-C", "-r", "-w", "--"]
        return [*enter, "env", "-i", _PATH, *command]

    def do(self, *command: str, stdin: str = "") -> str:
        """Run a command inside that has to succeed; return its output."""
        ran = self.run(*command, stdin=stdin)
        assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
        return ran.stdout

    def write(self, file: str, text: str) -> None:
        self.do("sh", "-c", f"mkdir -p $(dirname {file}) && cat > {file}", stdin=text)

    def _init(self) -> int:
        """Return the process that is the first one inside, 0: not yet.

        Before it, and for a moment beside it, there is a child of systemd-nspawn that only sets up its namespaces.
        """
        for child in self._children():
            with suppress(FileNotFoundError):
                [ids] = re.findall(r"^NSpid:(.*)$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)
                if len(ids.split()) > 1 and ids.split()[-1] == "1":
                    return int(child)
        return 0

    def _children(self) -> list[str]:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self._log.read_text()
        pid = self._nspawn.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@contextmanager
def machine_in(folder: Path, *, bind: Sequence[str] = (), packages: Sequence[str] = ()) -> Iterator[Machine]:
    """Make a machine whose disk is a layer above a base with these ``packages`` too, and destroy it afterwards."""
    root, upper, work = (folder / name for name in ("root", "upper", "work"))
    for each in (root, upper, work):
        each.mkdir()
    layers = f"lowerdir={ensure_base(*packages)},upperdir={upper},workdir={work}"
    mounted = _run(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)])
    assert mounted.returncode == 0, mounted.stderr
    machine = Machine(folder, bind=bind)
    try:
        yield machine
    finally:
        machine.destroy()
        _run(["umount", str(root)])


def until(holds: Callable[[], bool], *, deadline_s: float, says: Callable[[], str] = str) -> None:
    """Wait until something holds on a machine, which tells nobody when it does; where it never does it ``says`` why."""
    ends_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < ends_s, f"not within {deadline_s:g} s: {says()}"
        time.sleep(0.1)


def _run(command: Sequence[str], *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
