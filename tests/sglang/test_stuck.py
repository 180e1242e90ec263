"""SGLang that stands still, or goes wrong when ranks have begun to switch.

It is ended with the reason, and streams go on token-exactly under its supervisor (fp32).
"""

import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from engines.errors import EngineDied
from engines.sglang.adapter import SglangEngine
from tests.sglang.recovering import Made
from tests.support.deaths import NEW, OLD, TOKENS, Mortal, mortal
from tests.vllm.recovering import Streams
from tests.vllm.streams import move

pytestmark = [
    pytest.mark.engine,
    pytest.mark.sglang,
    pytest.mark.real_loop,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="module"),
]
COUNT = 4  # of streams
COMMIT_DEADLINE_S = 3.0
HANG_DEADLINE_S = 12.0  # more than a commit that stalls is given, and than two cores ever keep a process waiting


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Mortal]:
    options = {"hang_deadline_s": HANG_DEADLINE_S, "commit_deadline_s": COMMIT_DEADLINE_S, "verify_checksums": False}
    async with mortal(Made(**options), count=COUNT) as engines:
        yield engines


async def under_streams(engines: Mortal) -> tuple[SglangEngine, Streams]:
    streams = Streams(engines.supervisor, count=COUNT)
    await streams.begin(TOKENS)
    engine = engines.made.engines[-1]
    assert isinstance(engine, SglangEngine)
    return engine, streams


async def check_streams_go_on(engines: Mortal, dead: SglangEngine, streams: Streams) -> None:
    await streams.end()
    assert streams.tokens == [tokens for tokens, _ in engines.expected]
    assert engines.made.engines[-1] is not dead
    assert engines.supervisor.pipeline == OLD


@pytest.mark.parametrize(
    ("name", "action", "rank", "reason"),
    [
        ("worker.commit", "stall", 0, f"the ranks did not commit within {2 * COMMIT_DEADLINE_S:g} s"),
        ("worker.switch", "fail", 1, "a rank failed while it switched: FailpointHit: failpoint worker.switch"),
    ],
)
async def test_a_commit_that_stalls_or_fails_half_way_ends_it(
    engines: Mortal, name: str, action: str, rank: int, reason: str
) -> None:
    engine, streams = await under_streams(engines)
    await engine.arm_failpoint(name, action, rank=rank)
    with pytest.raises(EngineDied, match=reason):
        await move(engine, NEW)
    assert reason in await engine.died()
    await check_streams_go_on(engines, engine, streams)


async def test_a_scheduler_that_is_stopped_is_a_hang(engines: Mortal) -> None:
    engine, streams = await under_streams(engines)
    os.kill(engine.pids["workers"][-1], signal.SIGSTOP)
    assert "hung: work is pending and no step has finished" in await engine.died()
    await check_streams_go_on(engines, engine, streams)
