"""Our side of the process that measures layer times: starts it, reads what it says, ends it. No torch here."""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator

from engines.errors import EngineStartFailed, UnsupportedByEngine
from engines.native import timing_messages as t
from engines.native.options import NativeOptions
from engines.process import import_root

_LINE_LIMIT_BYTES = 4 << 20


async def measure_layers(
    options: NativeOptions, *, budget_s: float
) -> AsyncGenerator[t.TimingStarted | t.TimingPoint, None]:
    """Yield what is measured as it is measured. Closing the iterator ends the process.

    Raises:
        UnsupportedByEngine: The native engine does not run this model.
        EngineStartFailed: The process could not start or did not get to its end; the message has its last words.
    """
    environment = os.environ | {
        "OPENBLAS_NUM_THREADS": "1",  # numpy's: the process forks, so it must have no threads
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(import_root()), os.environ.get("PYTHONPATH", "")))),
    }
    try:
        process = await asyncio.create_subprocess_exec(
            *(options.python or sys.executable, "-m", "engines.native.layer_timing"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            limit=_LINE_LIMIT_BYTES,
        )
    except OSError as error:
        raise EngineStartFailed(f"cannot run {options.python}: {error.strerror}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        request = t.TimingRequest(options=options, parent_pid=os.getpid(), budget_s=budget_s)
        process.stdin.write(t.encode(request) + b"\n")
        process.stdin.close()
        while line := await process.stdout.readline():
            match t.decode_report(line):
                case t.TimingFailed() as failed:
                    raise (UnsupportedByEngine if failed.unsupported else EngineStartFailed)(failed.reason)
                case t.TimingDone():
                    return
                case report:
                    yield report
        raise EngineStartFailed(f"the measuring process ended: {await _last_words(process)}")
    finally:
        await _end(process)


async def _last_words(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    lines = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"status {await process.wait()}"


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()
