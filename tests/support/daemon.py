"""The real daemon as a process."""

import asyncio
import hashlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 300.0  # vLLM takes a minute to start, and more beside other work


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A daemon process; ``notified`` is where it thinks its service manager is, ``output`` what it writes."""

    process: asyncio.subprocess.Process
    config: Path
    admin: Path
    notified: socket.socket
    output: Path

    async def ended(self) -> str:
        """Wait until the daemon has ended; return what it wrote."""
        await self.process.wait()
        return self.output.read_text()

    async def notification(self, text: str) -> str:
        """Return the next message to the service manager that contains ``text``. Fails when the daemon ends first."""
        ended = asyncio.create_task(self.process.wait())
        try:
            async with asyncio.timeout(DEADLINE_S):
                while True:
                    receiving = asyncio.create_task(asyncio.get_running_loop().sock_recv(self.notified, 4096))
                    await asyncio.wait([receiving, ended], return_when=asyncio.FIRST_COMPLETED)
                    if not receiving.done():
                        receiving.cancel()
                        log = await self.ended()
                        pytest.fail(f"the daemon ended with {ended.result()} without saying {text}: {log[-3000:]}")
                    if text in (message := receiving.result().decode()):
                        return message
        finally:
            ended.cancel()

    def waiting_notifications(self) -> list[str]:
        """Return the messages to the service manager that have come and were not read."""
        found = []
        with suppress(BlockingIOError):
            while True:
                found.append(self.notified.recv(4096).decode())
        return found

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer of the admin API, to a POST where there is a body."""
        connector = aiohttp.UnixConnector(str(self.admin))
        async with (
            aiohttp.ClientSession("http://flexpiped", connector=connector) as session,
            session.request("GET" if body is None else "POST", path, json=body) as answer,
        ):
            return await answer.json()

    async def replicas_serving(self, count: int) -> list[dict[str, Any]]:
        """Wait until so many replicas serve, and return them as the status has them."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                replicas: list[dict[str, Any]] = (await self.ask("/status"))["replicas"]
                if [each["state"] for each in replicas] == ["serving"] * count:
                    return replicas
                await asyncio.sleep(0.02)

    async def flexctl(self, *arguments: str) -> tuple[int, str, str]:
        """Run flexctl; return its exit code, output and errors."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flexpiped.flexctl", "--socket", str(self.admin), *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


async def rebalanced_to_its_plan(daemon: Daemon, *arguments: str) -> int:
    """Have a plan made and carried out, and compare it with what runs then. Return the number of stages.

    ``arguments``: of ``flexctl plan`` and ``flexctl rebalance`` alike, such as ``--stages 4``; none: the best there is.
    """
    code, out, err = await daemon.flexctl("plan", "--json", *arguments)
    assert code == 0, out + err
    answer = json.loads(out)
    [chosen] = [each for each in answer["candidates"] if each["verdict"] == "chosen"]
    code, out, err = await daemon.flexctl("rebalance", "--wait", *arguments)
    assert code == 0, out + err
    planned = chosen["found"]["pipelines"][0]
    keys = ("device_ids", "first_decoder", "end_decoder")
    assert [{key: stage[key] for key in keys} for stage in (await daemon.ask("/status"))["stages"]] == planned
    return len(planned)


async def spawn(config: Path, output: Path, **environment: str) -> asyncio.subprocess.Process:
    """Start a daemon that writes to a file: a pipe that nobody reads would fill up and stop it."""
    with output.open("wb") as file:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flexpiped", "--config", str(config)),
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=asyncio.subprocess.STDOUT,
        )


async def run_until_exit(config: Path) -> tuple[int, str]:
    """Start a daemon that ends by itself; return its exit code and what it wrote."""
    output = config.with_name("output.log")
    process = await spawn(config, output)
    return await process.wait(), output.read_text()


def write_config(folder: Path, *, port: int = 0, stages: int | None = 2, engine: str = "fake", more: str = "") -> Path:
    """Write a configuration file; with None for the stages it says nothing of their number."""
    config = folder / "my.toml"
    socket_path = folder / "admin.sock"
    number = "" if stages is None else f"stages = {stages}\n"
    ours = f'engine = "{engine}"\n{number}http.port = {port}\nadmin.socket = "{socket_path}"\n'
    config.write_text(ours + more)
    return config


def write_keys(folder: Path, key: str) -> Path:
    """Write a file of API keys with this one in it, which opens all but changes."""
    file = folder / "keys.toml"
    digest = hashlib.sha256(key.encode()).hexdigest()
    file.write_text(f'[[keys]]\nname = "a"\nsha256 = "{digest}"\nscopes = ["infer", "read"]\n')
    return file


def bind_afresh(channel: socket.socket, address: str) -> None:
    """Bind where a daemon before may have left its socket."""
    Path(address).unlink(missing_ok=True)
    channel.bind(address)


@asynccontextmanager
async def started(
    folder: Path, *, ready: bool, engine: str = "fake", stages: int | None = 2, port: int = 0, more: str = ""
) -> AsyncIterator[Daemon]:
    """Start a daemon; ``more`` are further lines of its configuration file."""
    config = write_config(folder, port=port, engine=engine, stages=stages, more=more)
    address = str(folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        bind_afresh(notified, address)
        notified.setblocking(False)
        output = folder / "output.log"
        process = await spawn(config, output, NOTIFY_SOCKET=address, STATE_DIRECTORY=str(folder / "state"))
        daemon = Daemon(process=process, config=config, admin=folder / "admin.sock", notified=notified, output=output)
        try:
            await daemon.notification("READY=1" if ready else "STATUS=")
            yield daemon
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def completed(http: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> str:
    """Return the whole text of a completion; anything but success fails the test."""
    async with http.post(f"{url}/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return str((await answer.json())["choices"][0]["text"])
