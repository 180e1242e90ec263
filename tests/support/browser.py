"""A real Chromium, driven over its DevTools protocol: no package is needed besides the browser itself."""

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
    *("--no-first-run", "--disable-extensions", "--disable-sync", "--mute-audio", "--hide-scrollbars"),
    *("--remote-debugging-port=0", "--remote-debugging-address=127.0.0.1"),
)


def ensure_chromium() -> str:
    """Return the browser, or skip the test."""
    named = os.environ.get("FLEXPIPED_CHROMIUM")
    found = named or next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or FLEXPIPED_CHROMIUM=PATH")
    return found


class Page:
    """One tab. What goes wrong in it is kept: ``problems`` are errors of scripts, of the console and of loading."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.problems: list[str] = []
        self.requested: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says, for as long as it runs."""
        async for said in self._socket:
            message = json.loads(said.data)
            if "id" in message:
                self._answers.pop(message["id"]).set_result(message)
            else:
                self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", details["text"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(" ".join(str(each.get("value")) for each in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case _:
                pass

    async def send(self, method: str, **params: Any) -> Any:
        """Return the answer of the DevTools protocol."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        message = await self._answers[number]
        if "error" in message:
            raise AssertionError(f"{method}: {message['error']}")
        return message["result"]

    async def open(self, url: str, *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Load a page in a window of this size."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.look(width=width, height=height, dark=dark)
        await self.send("Page.navigate", url=url)

    async def look(self, *, width: int, height: int = 1000, dark: bool = False, still: bool = False) -> None:
        """Change the window, the system's theme, and whether things may move."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        answer = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression: str, *, timeout_s: float = 15.0) -> Any:
        """Return the value of an expression once it is true; it is asked for with each frame of the page."""
        script = (
            "new Promise((resolve, reject) => { const began = performance.now(); const look = () => {"
            f" let value; try {{ value = ({expression}); }} catch (error) {{ value = null; }}"
            f" if (value) resolve(value); else if (performance.now() - began > {timeout_s * 1000})"
            " reject(new Error('it did not come about')); else setTimeout(look, 20); }; look(); })"
        )
        return await self.run(script)

    async def press(self, key: str, *, text: str = "") -> None:
        """Press a key, as a user does who has no mouse."""
        codes = {
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Space": 32,
        }
        name = " " if key == "Space" else key
        typed = {"Enter": "\r", "Space": " "}.get(key, text)
        more = {"text": typed} if typed else {}
        code = codes.get(key, 0)
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=name, windowsVirtualKeyCode=code, **more)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=name, windowsVirtualKeyCode=code)

    async def write(self, text: str) -> None:
        """Type into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def picture(self, file: Path, *, whole: bool = False) -> None:
        """Write a screenshot."""
        shot = await self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        _write(file, base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser_page(folder: Path) -> AsyncIterator[Page]:
    """Start Chromium with an empty profile in ``folder`` and give its tab; skips the test where there is none."""
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        *(ensure_chromium(), *_FLAGS, f"--user-data-dir={profile}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(30.0):
            port = await _port_of(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            async with session.get("/json/list") as answer:
                tab = next(each for each in await answer.json() if each["type"] == "page")
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=64 << 20) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                yield page
                listening.cancel()
                await asyncio.wait([listening])
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def _port_in(file: Path) -> int | None:
    """Return the port, which Chromium writes once it listens."""
    lines = file.read_text().splitlines() if file.exists() else []
    return int(lines[0]) if lines else None


async def _port_of(file: Path) -> int:
    while (port := _port_in(file)) is None:  # noqa: ASYNC110  another process
        await asyncio.sleep(0.02)
    return port
