"""A process is held by pid and start time, and ended only when it is that very one."""

import asyncio
import signal
import sys

import pytest

from engines.found_process import FoundProcess, start_of

pytestmark = pytest.mark.real_loop


async def sleeper(*, ignores_term: bool = False) -> asyncio.subprocess.Process:
    code = "import signal, sys, time\n" + ("signal.signal(15, signal.SIG_IGN)\n" if ignores_term else "")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code + "print('up', flush=True)\ntime.sleep(600)"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    return process


async def test_a_pid_that_another_process_has_is_not_held() -> None:
    process = await sleeper()
    assert FoundProcess.hold(process.pid, start="1") is None
    process.kill()
    await process.wait()
    assert FoundProcess.hold(process.pid, start="1") is None
    assert start_of(process.pid) == ""


@pytest.mark.parametrize("ignores_term", [False, True])
async def test_it_is_asked_to_end_and_killed_if_it_does_not(ignores_term: bool) -> None:
    process = await sleeper(ignores_term=ignores_term)
    found = FoundProcess.hold(process.pid, start=start_of(process.pid))
    assert found is not None
    await found.end(grace_s=0.3 if ignores_term else 30.0)
    assert await found.ended() == "ended"
    assert await process.wait() == -(signal.SIGKILL if ignores_term else signal.SIGTERM)
    found.kill()  # nobody is there any more
    found.let_go()
    found.let_go()


async def test_one_that_is_let_go_runs_on() -> None:
    process = await sleeper()
    found = FoundProcess.hold(process.pid, start=start_of(process.pid))
    assert found is not None
    waiting = asyncio.create_task(found.ended())
    await asyncio.sleep(0)
    found.let_go()
    waiting.cancel()
    assert process.returncode is None
    process.kill()
    await process.wait()
