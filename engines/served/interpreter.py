"""Asks a Python interpreter which engine it has, without importing it: that would take half a minute."""

import asyncio
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engines.errors import EngineStartFailed, UnsupportedByEngine

DEADLINE_S: Final = 30.0
_VERSION: Final = re.compile(r"\d+\.\d+(\.\d+)?")
_PROBE: Final = """
import importlib.util, pathlib, re, sys
found = importlib.util.find_spec(sys.argv[1])
if found is None or found.origin is None:
    print("none")
else:
    text = (pathlib.Path(found.origin).parent / "_version.py").read_text()
    print(sys.argv[1], re.search(r"version = '([^']+)'", text)[1])
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The engine that an interpreter is to have. ``oldest`` is the first version that will do."""

    name: str  # for people
    package: str
    oldest: tuple[int, ...]


async def engine_version(wanted: Wanted, python: str, *, deadline_s: float = DEADLINE_S) -> str:
    """Return the version of the engine that ``python`` would import.

    Raises:
        EngineStartFailed: There is no such interpreter, it does not run, or it does not answer in time.
        UnsupportedByEngine: It has no such engine, or one that is too old.
    """
    name, package = wanted.name, wanted.package
    if not python:
        raise UnsupportedByEngine(f'engine "{package}" needs engines.{package}.python: an interpreter that has {name}')
    if not await asyncio.to_thread(Path(python).is_file):
        raise EngineStartFailed(f"engines.{package}.python: there is no {python}")
    answer = await _ask(python, package, deadline_s)
    match answer.split():
        case [found, version] if found == package:
            _ensure_known(wanted, version, python)
            return version
        case ["none"]:
            raise UnsupportedByEngine(f"{python} has no {name}: install it there, or name another interpreter")
        case _:
            said = answer.strip()[-500:] or "no answer"
            raise EngineStartFailed(f"{python} does not say which {name} it has: {said}")


def _ensure_known(wanted: Wanted, version: str, python: str) -> None:
    found = _VERSION.match(version)
    if found is None:
        raise UnsupportedByEngine(f"{python} has {wanted.name} {version!r}, which is no version that can be compared")
    if tuple(int(part) for part in found[0].split(".")) < wanted.oldest:
        oldest = ".".join(map(str, wanted.oldest))
        raise UnsupportedByEngine(f"{python} has {wanted.name} {version}: {oldest} or newer is needed")


async def _ask(python: str, package: str, deadline_s: float) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *(python, "-I", "-c", _PROBE, package),
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
