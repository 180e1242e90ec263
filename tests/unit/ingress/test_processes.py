"""The real daemon with two ingress processes, over TLS and with keys.

Both serve, one is killed under streams while the other's go on, both are told of a reload, and at the end they drain.
"""

import asyncio
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.adoption import family, runs
from tests.support.certificates import make_certificate
from tests.support.daemon import started, write_keys
from tests.support.doors import Door, ingresses_of
from tests.support.metrics import undocumented
from tests.support.until import until

pytestmark = pytest.mark.real_loop
STREAMS = 24
TOKENS = 300  # of 10 ms each: the streams outlive what is done under them


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def samples(exposition: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in exposition.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


class Port:
    """The HTTP port, with a connection of its own for each request, so that the kernel chooses a process each time.

    ``key`` and ``certificate``: what the client has, and what it expects.
    """

    def __init__(self, url: str, *, key: str, certificate: Path) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 0
        self._key = key
        self._tls = ssl.create_default_context(cafile=certificate)

    @asynccontextmanager
    async def asked(self, method: str, path: str, body: dict[str, Any] | None = None) -> AsyncIterator[Any]:
        """Ask, and yield the reader of the answer."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(data)}"]
        head = "\r\n".join([*lines, f"Authorization: Bearer {self._key}", "", ""])
        writer.write(head.encode() + data)
        try:
            yield reader
        finally:
            writer.close()

    async def whole(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        async with self.asked(method, path, body) as reader:
            answer = (await reader.read()).decode()
        return int(answer.split()[1]), answer.partition("\r\n\r\n")[2]

    async def stream(self, begun: asyncio.Semaphore) -> bool:
        """Have a stream, tell that it has begun, and say whether it came to its end."""
        body = {"prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        async with self.asked("POST", "/v1/completions", body) as reader:
            text = b""
            try:
                while part := await reader.read(1 << 16):
                    if not text:
                        begun.release()
                    text += part
            except (ConnectionResetError, ssl.SSLError):
                pass
        return b"data: [DONE]" in text


async def readings(port: Port) -> dict[str, float]:
    status, text = await port.whole("GET", "/metrics")
    assert status == 200, text
    assert undocumented(text) == []
    return samples(text)


async def settled(port: Port) -> dict[str, float]:
    """Wait until both take connections and nothing of any request is left."""
    async with asyncio.timeout(60):
        while True:
            now = await readings(port)
            if now["flexpiped_ingress_processes"] == 2 and not any(
                now[name]
                for name in (
                    "flexpiped_requests_in_flight",
                    "flexpiped_tokens_in_flight",
                    "flexpiped_engine_running_requests",
                    "flexpiped_engine_kv_blocks_used",
                )
            ):
                return now
            await asyncio.sleep(0.05)


async def all_answer(port: Port, status: int) -> None:
    """Wait until many connections in a row, and so both processes, answer so."""
    async with asyncio.timeout(30):
        while {await status_of(port) for _ in range(10)} != {status}:
            pass


async def status_of(port: Port) -> int:
    """Return what a small request is answered with; 0: the certificate is another one than is expected."""
    try:
        return (await port.whole("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1}))[0]
    except ssl.SSLCertVerificationError:
        return 0


async def test_two_of_them_of_which_one_is_killed_under_streams(tmp_path: Path) -> None:
    """One daemon for all of it, as each start takes seconds."""
    old, new = make_certificate(tmp_path, "old"), make_certificate(tmp_path, "new")
    shown = [tmp_path / name for name in ("shown.crt", "shown.key")]
    for made, copy in zip(old, shown, strict=True):
        copy.write_bytes(made.read_bytes())
    more = f'http.tls_certificate = "{shown[0]}"\nhttp.tls_key = "{shown[1]}"\nhttp.ingress_processes = 2\n'
    more += f'http.api_keys = "{write_keys(tmp_path, "one")}"\n'
    async with started(tmp_path, ready=True, more=more) as daemon:
        url = (await daemon.ask("/status"))["api_url"]
        port = Port(url, key="one", certificate=old[0])
        before = ingresses_of(daemon.process.pid)
        assert len(before) == 2
        begun = asyncio.Semaphore(0)
        streams = [asyncio.create_task(port.stream(begun)) for _ in range(STREAMS)]
        for _ in streams:
            await begun.acquire()
        now = await readings(port)
        shares = {number: now[f'flexpiped_ingress_requests{{ingress="{number}"}}'] for number in (1, 2)}
        assert sum(shares.values()) == STREAMS
        assert min(shares.values()) > 0  # that all go to one process: once in 2**23 times

        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        whole = sum(await asyncio.gather(*streams))
        assert whole in shares.values()

        now = await settled(port)
        restarts = sum(now[f'flexpiped_ingress_restarts_total{{ingress="{number}"}}'] for number in (1, 2))
        assert restarts == 1
        assert now['flexpiped_requests_total{endpoint="completions",outcome="disconnected"}'] == STREAMS - whole
        after = ingresses_of(daemon.process.pid)
        assert len(after) == 2
        assert victim not in after

        write_keys(tmp_path, "two")
        for made, copy in zip(new, shown, strict=True):
            copy.write_bytes(made.read_bytes())
        daemon.process.send_signal(signal.SIGHUP)
        await daemon.notification("READY=1")
        port = Port(url, key="two", certificate=new[0])
        await all_answer(port, 200)
        await all_answer(Port(url, key="one", certificate=new[0]), 401)

        last = asyncio.create_task(port.stream(begun))
        await begun.acquire()
        daemon.process.send_signal(signal.SIGTERM)  # what is under way is finished first
        status, said = await port.whole("POST", "/v1/completions", {"prompt": "x"})
        assert (status, json.loads(said)["error"]["code"]) == (503, "draining")
        assert await last
        log = await daemon.ended()
        assert daemon.process.returncode == 0, log
        assert not any(map(is_there, after))


async def test_killed_the_daemon_leaves_none_of_them_behind(tmp_path: Path) -> None:
    """Nor what they have started, also while a request is under way."""
    async with started(tmp_path, ready=True, more="http.ingress_processes = 2\n") as daemon:
        url = str((await daemon.ask("/status"))["api_url"]).removesuffix("/v1")
        processes = family(daemon.process.pid)
        assert len(processes) == 1 + 1 + 2 * 2  # the daemon, two ingresses, and a text process for each of the three
        body = {"prompt": "x", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        async with Door(url, min(ingresses_of(daemon.process.pid))).asked("POST", "/v1/completions", body):
            daemon.process.kill()
            await until(lambda: not any(map(runs, processes)), timeout_s=30.0)
