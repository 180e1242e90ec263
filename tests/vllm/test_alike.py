"""Answers to a table of requests, member by member with those of vLLM's own server on the same checkpoint.

A difference is mended, or it stands in ``alike_known`` with its reason.
"""

from collections.abc import AsyncIterator, Iterable
from fnmatch import fnmatchcase

import aiohttp
import pytest
import pytest_asyncio

from engines.vllm.adapter import VllmEngine
from flexpiped.api.tool_syntax import HERMES, ToolCalls
from tests.support import native
from tests.support.alike import Answered, answer_of, differences
from tests.support.own_routes import api_before, own_server_of
from tests.support.vllm import llama
from tests.vllm.alike_known import KNOWN
from tests.vllm.alike_requests import IN_THE_GATE, REQUESTS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.vllm,
    pytest.mark.real_loop,
    pytest.mark.asyncio(loop_scope="session"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def theirs(engine: VllmEngine) -> AsyncIterator[aiohttp.ClientSession]:
    async with own_server_of(engine) as session:
        yield session


async def answers_of(session: aiohttp.ClientSession, names: Iterable[str]) -> dict[str, Answered]:
    return {name: await answer_of(session, REQUESTS[name]) for name in names}


def found_between(engine: str, theirs: dict[str, Answered], ours: dict[str, Answered]) -> list[str]:
    return [
        f"{engine}: {name}: {each}"
        for name, one in theirs.items()
        for each in differences(one, ours[name], drawn=REQUESTS[name].drawn)
    ]


def ensure_explained(found: Iterable[str]) -> None:
    others = [each for each in found if not any(fnmatchcase(each, pattern) for pattern in KNOWN)]
    assert not others, "not in the table:\n" + "\n".join(others)


async def test_vllm_behind_the_daemon_answers_as_vllm_does(theirs: aiohttp.ClientSession, engine: VllmEngine) -> None:
    names = {name for pattern in IN_THE_GATE for name in REQUESTS if fnmatchcase(name, pattern)}
    async with api_before(engine, model=llama()) as api, aiohttp.ClientSession(api.url) as session:
        found = found_between("vllm", await answers_of(theirs, names), await answers_of(session, names))
    ensure_explained(found)


@pytest.mark.long
async def test_each_answer_is_that_of_vllm_but_for_what_is_explained(
    theirs: aiohttp.ClientSession, engine: VllmEngine
) -> None:
    expected = await answers_of(theirs, REQUESTS)
    async with api_before(engine, model=llama()) as api, aiohttp.ClientSession(api.url) as session:
        found = found_between("vllm", expected, await answers_of(session, REQUESTS))
    limit = engine.capabilities.max_model_len
    async with (
        native.running(llama(), native.layout(4), max_model_len=limit) as other,
        api_before(other, model=llama(), tool_calls=ToolCalls(syntax=HERMES)) as api,
        aiohttp.ClientSession(api.url) as session,
    ):
        found += found_between("native", expected, await answers_of(session, REQUESTS))
    ensure_explained(found)
    unneeded = [pattern for pattern in KNOWN if not any(fnmatchcase(each, pattern) for each in found)]
    assert unneeded == []
