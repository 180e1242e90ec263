"""Two native models in one daemon: each is moved, stopped, started and swapped under streams of the other.

Every stream gives the tokens of an undisturbed one. ``tests/unit/test_models.py`` is the short form, without a model.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from flexpiped.models import demo_model_places
from tests.support.daemon import Daemon, started
from tests.support.native import llama

pytestmark = [pytest.mark.engine, pytest.mark.real_loop, pytest.mark.long]
DEMO = demo_model_places()[0]


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    tables = f'[models.story]\nmodel = "{DEMO}"\nstages = 2\n[models.other]\nmodel = "{llama()}"\nstages = 1\n'
    async with started(tmp_path, ready=True, engine="native", more=tables) as daemon:
        yield daemon


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[openai.AsyncOpenAI]:
    url = (await daemon.ask("/status"))["api_url"]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def text(client: openai.AsyncOpenAI, model: str, *, seed: int = 1, max_tokens: int = 600) -> str:
    """Return what a stream says: 600 tokens take some seconds, in which something happens."""
    options: Any = {"ignore_eos": True}
    chunks = await client.completions.create(
        model=model,
        prompt=[5, 6, 7, 8],
        max_tokens=max_tokens,
        temperature=0.8 * (seed % 2),
        seed=seed,
        stream=True,
        extra_body=options,
    )
    return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])


async def do(daemon: Daemon, *arguments: str) -> str:
    code, out, err = await daemon.flexctl(*arguments)
    assert code == 0, out + err
    return out


async def states(daemon: Daemon) -> dict[str, tuple[str, int]]:
    listed = json.loads(await do(daemon, "model", "list", "--json"))["models"]
    return {each["name"]: (each["state"], each["stages"]) for each in listed}


async def test_each_changes_under_streams_of_the_other_and_no_token_is_another_one(
    daemon: Daemon, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    names = ("story", "other")
    alone = {(name, seed): await text(client, name, seed=seed) for name in names for seed in (1, 2)}
    assert alone["story", 1] != alone["other", 1]

    streams = {key: asyncio.create_task(text(client, key[0], seed=key[1])) for key in alone}
    await asyncio.sleep(0.3)
    await do(daemon, "rebalance", "--model", "story", "--stages", "4", "--wait")
    await do(daemon, "rebalance", "--model", "other", "--stages", "2", "--wait")
    assert {key: await each for key, each in streams.items()} == alone
    assert await states(daemon) == {"story": ("ready", 4), "other": ("ready", 2)}
    code, _, err = await daemon.flexctl("rebalance", "--stages", "1")
    assert (code, "story, other" in err) == (4, True)

    story = asyncio.create_task(text(client, "story"))
    others = [asyncio.create_task(text(client, "other")) for _ in range(3)]
    await asyncio.sleep(0.3)
    said = await do(daemon, "model", "stop", "story")
    assert "every request was answered" in said
    assert await story == alone["story", 1]  # it was let finish
    assert (await states(daemon))["story"] == ("stopped", 0)
    assert [await each for each in others] == [alone["other", 1]] * 3

    others = [asyncio.create_task(text(client, "other", seed=2)) for _ in range(2)]
    await do(daemon, "model", "start", "story")
    assert [await each for each in others] == [alone["other", 2]] * 2
    assert (await states(daemon))["story"] == ("ready", 4)  # as it was

    twin = tmp_path / "twin"
    twin.symlink_to(llama())
    story = asyncio.create_task(text(client, "story"))
    others = [asyncio.create_task(text(client, "other"))]
    await asyncio.sleep(0.3)
    said = await do(daemon, "model", "swap", "story", str(twin))
    assert "the new one serves" in said
    assert await story == alone["story", 1]  # begun with the old one, and finished there
    assert await others[0] == alone["other", 1]
    assert await text(client, "story") == alone["other", 1]  # the same files now
