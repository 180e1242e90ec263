"""A flexpiped daemon under measurement: started from a configuration of its own, moved by its admin API."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec

from engines.protocol import RefactorProgress
from flexpiped.flexctl.client import AdminClient, CtlError
from planner.layout import Pipeline
from planner.layout_file import format_layout
from tests.bench.processes import command_of, descendants, leashed, pss_bytes
from tests.bench.program import EngineSetup

_START_DEADLINE_S = 300.0
BATCHED_TOKENS = 2048  # of one step, wherever vLLM or SGLang is measured
_SOCKET = "admin.sock"


class DaemonFailed(Exception):
    """The daemon did not come up, or a handover did not end as it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonPids:
    """The daemon's processes by what they do."""

    daemon: int
    text: tuple[int, ...]
    core: tuple[int, ...]
    workers: tuple[int, ...]


class DaemonProcess:
    """A daemon that serves the model ``bench``."""

    def __init__(self, leash_pid: int, socket: Path) -> None:
        self._leash_pid = leash_pid
        self._admin = AdminClient([socket])
        self.url = ""

    async def wait_ready(self, process: asyncio.subprocess.Process) -> None:
        """Return when requests are served. Raises: DaemonFailed."""
        deadline_s = time.monotonic() + _START_DEADLINE_S
        state = "not reachable"
        while time.monotonic() < deadline_s and process.returncode is None:
            try:
                answer = await asyncio.to_thread(self._admin.call, "GET", "/status")
            except CtlError:
                answer = {"state": state}
            state = answer["state"]
            if state == "ready":
                self.url = str(answer["api_url"]).removesuffix("/v1")
                return
            await asyncio.sleep(0.1)
        raise DaemonFailed(f"the daemon is {state}")

    async def move(self, target: Pipeline) -> list[RefactorProgress]:
        """Change the layout and return all reports, none if it is in force already. Raises: DaemonFailed."""
        return await asyncio.to_thread(self._move, target)

    async def decisions(self) -> list[dict[str, Any]]:
        """Return what was decided so far, as ``flexctl decisions --json`` does."""
        return await asyncio.to_thread(lambda: list(self._admin.stream("GET", "/decisions")))

    def memory_bytes(self) -> int:
        """Return the proportional set size of the daemon and everything under it."""
        return pss_bytes(descendants(self._leash_pid))

    def pids(self) -> DaemonPids:
        """Return the processes as they are now."""
        daemon, *below = descendants(self._leash_pid)
        commands = {pid: command_of(pid) for pid in below}
        text = tuple(pid for pid, command in commands.items() if "engines.text" in command)
        natives = [pid for pid, command in commands.items() if "engines.native.core" in command]
        return DaemonPids(daemon=daemon, text=text, core=tuple(natives[:1]), workers=tuple(natives[1:]))

    def _move(self, target: Pipeline) -> list[RefactorProgress]:
        body = {"layout": format_layout(target), "wait": True}
        reports: list[RefactorProgress] = []
        last: dict[str, Any] = {}
        for event in self._admin.stream("POST", "/rebalance", body):
            last = event
            if (progress := event.get("fields", {}).get("progress")) is not None:
                reports.append(msgspec.convert(progress, RefactorProgress))
        if last.get("state") == "unchanged":
            return []
        if last.get("fields", {}).get("record", {}).get("result") != "done":
            raise DaemonFailed(f"the handover did not end well: {last}")
        return reports


@asynccontextmanager
async def daemon(
    model: Path,
    setup: EngineSetup,
    *,
    stages: int,
    engine: str = "native",
    python: Path | None = None,
    more: str = "",
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[DaemonProcess]:
    """Start a daemon, with ``vllm`` or ``sglang`` as its engine where its interpreter is named; it ends with the scope.

    Its log is shown when it does not come up.

    Args:
        more: Further lines of its configuration, first those of the engine, then tables.

    Raises:
        DaemonFailed
    """
    with TemporaryDirectory(prefix="flexpiped-bench-") as name:
        folder = Path(name)
        config, log = folder / "bench.toml", folder / "log"
        keys = _native(setup) if python is None else _served(engine, setup, python)
        config.write_text(_configuration(model, setup, engine=engine, stages=stages, folder=folder) + keys + more)
        command = [sys.executable, "-m", "flexpiped", "--config", str(config)]
        async with leashed(command, environment=environment or {}, folder=folder, log=log) as process:
            started = DaemonProcess(process.pid, folder / _SOCKET)
            try:
                await started.wait_ready(process)
            except DaemonFailed as error:
                raise DaemonFailed(f"{error}:\n{log.read_text()[-4000:]}") from None
            yield started


def _configuration(model: Path, setup: EngineSetup, *, engine: str, stages: int, folder: Path) -> str:
    return f"""
model = "{model}"
served_model_name = "bench"
engine = "{engine}"
stages = {stages}
dtype = "float32"
[http]
port = 0
[admin]
socket = "{folder / _SOCKET}"
[devices]
cpu_count = {setup.devices}
cpu_memory = {setup.device_memory_bytes}
"""


def _native(setup: EngineSetup) -> str:
    return f"""
[engines.native]
threads = {setup.threads}
nice = {setup.nice}
kv_cache = {setup.kv_cache_bytes}
{f"threads_per_device = {setup.threads_per_device}" if setup.threads_per_device else ""}
{f"kv_cache_per_device = {setup.kv_device_bytes}" if setup.kv_device_bytes else ""}
"""


def _served(engine: str, setup: EngineSetup, python: Path) -> str:
    return f"""
[engines.{engine}]
python = "{python}"
threads = {setup.threads}
nice = {setup.nice}
kv_cache = {setup.kv_cache_bytes}
max_num_batched_tokens = {BATCHED_TOKENS}
"""
