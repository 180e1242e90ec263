"""The official openai client for Node, installed once into the cache, and one flow of it at a time."""

import asyncio
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.http_app import MODEL
from tests.support.native import CACHE

VERSION = "6.49.0"
_PROGRAM = Path(__file__).with_suffix(".mjs")
_INSTALL = ("npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")


async def packages() -> Path:
    """Return the directory that has the client in its ``node_modules``, or skip where there is no Node."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("the openai client for Node needs node and npm on the PATH")
    directory = CACHE.parent / f"openai-node-{VERSION}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=directory.parent, prefix="openai-node-"))
        status, output = await _run(*_INSTALL, "--prefix", str(fresh), f"openai@{VERSION}")
        assert status == 0, output
        _put(fresh, directory)
    return directory


def _put(fresh: Path, directory: Path) -> None:
    try:
        fresh.rename(directory)
    except OSError:  # another run was faster
        shutil.rmtree(fresh)


async def run_flow(name: str, url: str) -> Any:
    """Run a flow of ``openai_node.mjs`` against ``url`` and return what it found."""
    status, output = await _run("node", str(_PROGRAM), str(await packages()), url, MODEL, name)
    assert status == 0, output
    return json.loads(output.splitlines()[-1])


async def _run(*command: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    return process.returncode, output.decode()
