"""A native model and one of another engine in one daemon: each changes under streams of the other."""

import asyncio
import json
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import openai

from flexpiped.models import demo_model_places
from tests.native.test_several_models import do, states, text
from tests.support.adoption import family, runs
from tests.support.daemon import Daemon, started
from tests.support.until import until
from tests.support.vllm import llama

STORY = f'[models.story]\nmodel = "{demo_model_places()[0]}"\nstages = 2\n'


async def beside_a_native_one(folder: Path, *, engine: str, python: str) -> None:
    """Have the model "other", of that engine, and "story", a native one, moved, stopped, started, swapped, taken out.

    Every stream gives the tokens of an undisturbed one.
    """
    other = (
        f'[models.other]\nmodel = "{llama()}"\nengine = "{engine}"\nstages = 3\ndtype = "float32"\n'
        f'engines.{engine}.python = "{python}"\nengines.{engine}.kv_cache = "32 MiB"\n'
    )
    async with AsyncExitStack() as stack:
        daemon = await stack.enter_async_context(started(folder, ready=True, engine="native", more=STORY + other))
        await until(lambda: both_ready(daemon), timeout_s=240.0)
        url = (await daemon.ask("/status"))["api_url"]
        client = await stack.enter_async_context(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0))
        alone = await moved_under_streams(daemon, client)
        await stopped_and_started(daemon, client, alone)
        await swapped(daemon, client, alone, twin=twin_in(folder))
        await taken_out(daemon, client, alone, table=other)
        history = [event["message"] for event in (await daemon.ask("/history"))["events"]]
        assert "model other is being stopped" in history
        assert not any("the daemon is shutting down" in message for message in history)
        lines = [json.loads(line) for line in daemon.output.read_text().splitlines() if line.startswith("{")]
        assert {line.get("model") for line in lines if line.get("engine") == engine} == {"other"}


async def text_of(client: openai.AsyncOpenAI, model: str, seed: int) -> str:
    """Return what a stream says, in which something happens: the other engine's tokens come more slowly."""
    return await text(client, model, seed=seed, max_tokens=600 if model == "story" else 400)


async def moved_under_streams(daemon: Daemon, client: openai.AsyncOpenAI) -> dict[tuple[str, int], str]:
    """Return the text of each stream, by model and seed."""
    keys = [("story", 1), ("story", 2), ("other", 2)]  # of the other engine's, greedy
    alone = {(name, seed): await text_of(client, name, seed) for name, seed in keys}
    streams = {key: asyncio.create_task(text_of(client, *key)) for key in keys}
    await do(daemon, "rebalance", "--model", "other", "--stages", "2", "--wait")
    await do(daemon, "rebalance", "--model", "story", "--stages", "4", "--wait")
    assert {key: await each for key, each in streams.items()} == alone
    assert await states(daemon) == {"story": ("ready", 4), "other": ("ready", 2)}
    return alone


async def stopped_and_started(daemon: Daemon, client: openai.AsyncOpenAI, alone: dict[tuple[str, int], str]) -> None:
    before = family(daemon.process.pid)
    other = asyncio.create_task(text_of(client, "other", 2))
    stories = [asyncio.create_task(text(client, "story")) for _ in range(2)]
    await asyncio.sleep(0.3)
    assert "every request was answered" in await do(daemon, "model", "stop", "other")
    assert await other == alone["other", 2]  # it was let finish
    assert [await each for each in stories] == [alone["story", 1]] * 2
    assert await states(daemon) == {"story": ("ready", 4), "other": ("stopped", 0)}
    assert await text(client, "story") == alone["story", 1]
    assert sum(not runs(pid) for pid in before) >= 4  # its server and workers

    stories = [asyncio.create_task(text(client, "story")) for _ in range(2)]
    await do(daemon, "model", "start", "other")
    assert [await each for each in stories] == [alone["story", 1]] * 2
    assert (await states(daemon))["other"] == ("ready", 2)  # as it was
    assert await text_of(client, "other", 2) == alone["other", 2]


async def swapped(daemon: Daemon, client: openai.AsyncOpenAI, alone: dict[tuple[str, int], str], *, twin: Path) -> None:
    other = asyncio.create_task(text_of(client, "other", 2))
    story = asyncio.create_task(text(client, "story"))
    assert "the new one serves" in await do(daemon, "model", "swap", "other", str(twin))
    assert (await other, await story) == (alone["other", 2], alone["story", 1])
    assert await text_of(client, "other", 2) == alone["other", 2]  # the same files


async def taken_out(
    daemon: Daemon, client: openai.AsyncOpenAI, alone: dict[tuple[str, int], str], *, table: str
) -> None:
    story = asyncio.create_task(text(client, "story"))
    daemon.config.write_text(daemon.config.read_text().replace(table, ""))
    await do(daemon, "reload")
    await until(lambda: only_story(daemon), timeout_s=60.0)
    assert await story == alone["story", 1]
    assert await text(client, "story") == alone["story", 1]


def twin_in(folder: Path) -> Path:
    """Return a copy of the model's files."""
    return Path(shutil.copytree(llama(), folder / "twin"))


async def both_ready(daemon: Daemon) -> bool:
    return all(state == "ready" for state, _ in (await states(daemon)).values())


async def only_story(daemon: Daemon) -> bool:
    return list(await states(daemon)) == ["story"]
