"""vLLM or SGLang behind two ingress processes: what clients get through each of them, whatever happens meanwhile.

Each kind of stream goes its own way through an ingress: text is made there of the daemon's tokens, and what the
engine's own server answers is fetched from it directly.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.support.adoption import family, moved, runs
from tests.support.daemon import Daemon, started
from tests.support.doors import Door, ingresses_of
from tests.support.hanging_up import LEVELS, leave_at_random
from tests.support.metrics import metrics_of, metrics_series
from tests.support.until import until
from tests.support.vllm import llama

_GREEDY: Final = {"max_tokens": 250, "temperature": 0, "ignore_eos": True, "stream": True}
_MESSAGES: Final = [{"role": "user", "content": "Which colour?"}]
STREAMS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "completions": ("/v1/completions", {"prompt": "Once", **_GREEDY}),
    "chat": ("/v1/chat/completions", {"messages": _MESSAGES, **_GREEDY}),
    "own": ("/v1/completions", {"prompt": "Once", "return_token_ids": True, **_GREEDY}),
    "own chat": ("/v1/chat/completions", {"messages": _MESSAGES, "logprobs": True, **_GREEDY}),
}
_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"  # what ends with half a character: vLLM shows nothing of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a stream has said, with token ids where it tells them; ``is_whole``: up to its end."""

    text: str
    token_ids: tuple[int, ...]
    is_whole: bool


async def behind_two_ingresses(folder: Path, *, engine: str, python: str) -> None:
    """One daemon for all of it, as the engine takes a minute to start."""
    own = f'[engines.{engine}]\npython = "{python}"\nkv_cache = "32 MiB"\n'
    more = f'model = "{llama()}"\ndtype = "float32"\nhttp.ingress_processes = 2\n{own}'
    async with started(folder, ready=True, engine=engine, stages=3, more=more) as daemon:
        url = str((await daemon.ask("/status"))["api_url"]).removesuffix("/v1")
        doors = [Door(url, pid) for pid in sorted(ingresses_of(daemon.process.pid))]
        assert len(doors) == 2
        alone = await told_alone(doors)
        await further_routes(doors)
        await hung_up(url, doors)
        await moved_under_streams(daemon, doors, alone)
        doors = await one_killed(daemon, url, doors, alone)
        await drained(daemon, doors, alone)


async def told_alone(doors: list[Door]) -> dict[str, Told]:
    """Return what each stream says while nothing else happens, which is the same through both."""
    first, second = [{kind: await told(door, kind) for kind in STREAMS} for door in doors]
    assert first == second
    assert all(each.is_whole for each in first.values())
    ours, theirs = (first[kind].text.rstrip(_UNFINISHED) for kind in ("completions", "own"))
    assert ours == theirs, (ours, theirs)
    assert len(first["own"].token_ids) == _GREEDY["max_tokens"]
    return first


async def further_routes(doors: list[Door]) -> None:
    """What only the engine's own server has, and what the daemon answers, comes through each of them."""
    asked = {"model": llama().name, "input": "x", "max_output_tokens": 4}  # SGLang's wants to be told the model
    for door in doors:
        status, answer = await door.answer("POST", "/tokenize", {"prompt": "Once"})
        assert (status, len(answer["tokens"]) > 1) == (200, True)
        status, answer = await door.answer("POST", "/v1/responses", asked)
        assert (status, answer.get("object")) == (200, "response"), answer
        status, answer = await door.answer("POST", "/v1/embeddings", {"input": "x"})
        assert status in (400, 404), answer  # in its words: the model generates
        status, answer = await door.answer("POST", "/v1/completions", {"prompt": [5, 10**6], "n": 2})
        assert status == 400, answer
        status, answer = await door.answer("GET", "/v1/models")
        assert (status, [each["id"] for each in answer["data"]]) == (200, [llama().name])


async def hung_up(url: str, doors: list[Door]) -> None:
    """Clients that leave, in the midst of each kind of stream and at random, leave nothing behind."""
    for door in doors:
        for kind in STREAMS:
            async with begun(door, kind):
                pass
    await leave_at_random(url, clients=60, at_once=12, max_tokens=60)
    await settled(url)


async def moved_under_streams(daemon: Daemon, doors: list[Door], alone: dict[str, Told]) -> None:
    """Layers move while every kind of stream runs through both of them, over and over, and each says the same."""
    is_over = asyncio.Event()

    async def again_and_again(door: Door, kind: str) -> None:
        while not is_over.is_set():
            assert await told(door, kind) == alone[kind]

    async with asyncio.TaskGroup() as group:
        for door in doors:
            for kind in STREAMS:
                group.create_task(again_and_again(door, kind))
        try:
            for stages in (2, 3, 2, 3):
                await moved(daemon, stages=stages)
        finally:
            is_over.set()


async def one_killed(daemon: Daemon, url: str, doors: list[Door], alone: dict[str, Told]) -> list[Door]:
    """``kill -9`` of one: its streams end, those of the other go on, and one comes in its place. Return both."""
    victim, other = doors
    async with asyncio.TaskGroup() as group:
        lost = await all_running(group, [victim], max_tokens=1500)  # more than there is time for
        kept = await all_running(group, [other])
        os.kill(victim.pid, signal.SIGKILL)
    assert [kind for (_, kind), stream in lost.items() if stream.result().is_whole] == []
    assert [kind for (_, kind), stream in kept.items() if stream.result() != alone[kind]] == []
    await settled(url)
    assert sum(value for _, value in await metrics_series(url, "flexpiped_ingress_restarts_total")) == 1
    [new] = ingresses_of(daemon.process.pid) - {other.pid}
    assert new != victim.pid
    now = [Door(url, new), other]
    assert await told_alone(now) == alone
    return now


async def drained(daemon: Daemon, doors: list[Door], alone: dict[str, Told]) -> None:
    """SIGTERM: every kind of stream is finished first, and both refuse what comes; then nothing is left."""
    processes = family(daemon.process.pid)
    async with asyncio.TaskGroup() as group:
        last = await all_running(group, doors)
        assert not all(stream.done() for stream in last.values())
        daemon.process.send_signal(signal.SIGTERM)
        await until(lambda: is_draining(doors), timeout_s=10.0)
    assert [key for key, stream in last.items() if stream.result() != alone[key[1]]] == []
    log = await daemon.ended()
    assert daemon.process.returncode == 0, log
    assert not [pid for pid in processes if runs(pid)]


async def is_draining(doors: list[Door]) -> bool:
    short = {"max_tokens": 1, "stream": False}  # for the moment before it is so
    answers = [await door.answer("POST", path, body | short) for door in doors for path, body in STREAMS.values()]
    return all(status == 503 and answer["error"]["code"] == "draining" for status, answer in answers)


async def settled(url: str) -> None:
    """Wait until both take connections and nothing of any request is left."""

    async def is_so() -> bool:
        now = await metrics_of(url)
        return now["flexpiped_ingress_processes"] == 2 and not any(now[name] for name in LEVELS)

    await until(is_so)


async def all_running(
    group: asyncio.TaskGroup, doors: list[Door], **more: Any
) -> dict[tuple[int, str], "asyncio.Task[Told]"]:
    """Return a stream of each kind through each of them, by pid and kind, once all have begun; ``more``: in each."""
    have_begun = asyncio.Semaphore(0)

    async def read(door: Door, kind: str) -> Told:
        async with begun(door, kind, **more) as (first, reader):
            have_begun.release()
            return said(first + await to_the_end(reader))

    streams = {(door.pid, kind): group.create_task(read(door, kind)) for door in doors for kind in STREAMS}
    for _ in streams:
        await have_begun.acquire()
    return streams


async def told(door: Door, kind: str) -> Told:
    async with begun(door, kind) as (first, reader):
        return said(first + await to_the_end(reader))


@asynccontextmanager
async def begun(door: Door, kind: str, **more: Any) -> AsyncIterator[tuple[bytes, asyncio.StreamReader]]:
    """Yield a stream's first event and the reader of the others."""
    path, body = STREAMS[kind]
    async with door.asked("POST", path, body | more) as (status, reader):
        if status != 200:
            raise AssertionError((await reader.read()).decode())
        yield await reader.readuntil(b"\n\n"), reader


async def to_the_end(reader: asyncio.StreamReader) -> bytes:
    """Return all that comes, also where the other side breaks off."""
    read = b""
    try:
        while part := await reader.read(1 << 16):
            read += part
    except ConnectionResetError:
        pass
    return read


def said(stream: bytes) -> Told:
    whole = stream.decode().removesuffix("\n\n").split("\n\n")
    lines = [event.removeprefix("data: ") for event in whole]
    is_whole = lines[-1] == "[DONE]"
    choices = [each for line in lines[:-1] for each in json.loads(line).get("choices", ())]
    texts = [each["delta"].get("content") if "delta" in each else each["text"] for each in choices]
    token_ids = tuple(token_id for each in choices for token_id in each.get("token_ids") or ())
    return Told(text="".join(text or "" for text in texts), token_ids=token_ids, is_whole=is_whole)
