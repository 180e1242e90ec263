"""Asks a Python interpreter which vLLM it has, without importing vLLM: that would take half a minute."""

import asyncio
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from engines.errors import EngineStartFailed, UnsupportedByEngine

OLDEST: Final = (0, 32)  # the first with endpoint plugins, which carry requests and tokens
_DEADLINE_S: Final = 30.0
_VERSION: Final = re.compile(r"(\d+)\.(\d+)")
_PROBE: Final = """
import importlib.util, pathlib, re
found = importlib.util.find_spec("vllm")
if found is None or found.origin is None:
    print("none")
else:
    text = (pathlib.Path(found.origin).parent / "_version.py").read_text()
    print("vllm", re.search(r"version = '([^']+)'", text)[1])
"""


async def vllm_version(python: str, *, deadline_s: float = _DEADLINE_S) -> str:
    """Return the version of the vLLM that ``python`` would import.

    Raises:
        EngineStartFailed: There is no such interpreter, it does not run, or it does not answer in time.
        UnsupportedByEngine: It has no vLLM, or one that is too old.
    """
    if not python:
        raise UnsupportedByEngine('engine "vllm" needs engines.vllm.python: an interpreter that has vLLM')
    if not await asyncio.to_thread(Path(python).is_file):
        raise EngineStartFailed(f"engines.vllm.python: there is no {python}")
    answer = await _ask(python, deadline_s)
    match answer.split():
        case ["vllm", version]:
            _ensure_known(version, python)
            return version
        case ["none"]:
            raise UnsupportedByEngine(f"{python} has no vLLM: install it there, or name another interpreter")
        case _:
            raise EngineStartFailed(f"{python} does not say which vLLM it has: {answer.strip()[-500:] or 'no answer'}")


def is_cpu_build(python: Path) -> bool:
    """Return whether the vLLM of an interpreter is built for the CPU, by the name under which it is installed."""
    return any(python.parent.parent.glob("lib/python3*/site-packages/vllm*cpu*.dist-info"))


def _ensure_known(version: str, python: str) -> None:
    found = _VERSION.match(version)
    if found is None:
        raise UnsupportedByEngine(f"{python} has vLLM {version!r}, which is no version that can be compared")
    if (int(found[1]), int(found[2])) < OLDEST:
        raise UnsupportedByEngine(f"{python} has vLLM {version}: {OLDEST[0]}.{OLDEST[1]} or newer is needed")


async def _ask(python: str, deadline_s: float) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-I", "-c", _PROBE),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={"PATH": os.environ.get("PATH", "")},
        )
    except OSError as error:
        raise EngineStartFailed(f"cannot run {python}: {error.strerror}") from error
    try:
        output, _ = await asyncio.wait_for(process.communicate(), deadline_s)
    except TimeoutError:
        raise EngineStartFailed(f"{python} did not answer within {deadline_s:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return output.decode(errors="replace")
