"""Quantised and multimodal models, through the daemon: served, and not moved in place, by the feature's name.

A start takes a minute, so the gate has one of them, and ``test_internals.py`` the refusals of the others. Its daemon is
killed at the end: what follows from that is the same with any model.
"""

import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engines.served.run_directory import sweep
from tests.support import checkpoint_kinds as kinds
from tests.support.daemon import Daemon, started
from tests.support.native import CACHE
from tests.support.until import until
from tests.support.vllm import interpreter
from tests.vllm.remains import descendants, run_directory_of, runs, shared_memory

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

OTHER_CUT = '{"stages": [{"devices": ["cpu:0"], "decoders": [0, 2]}, {"devices": ["cpu:1"], "decoders": [2, 8]}]}'
Json = dict[str, Any]


@asynccontextmanager
async def serving(folder: Path, model: Path) -> AsyncIterator[Daemon]:
    """Start the daemon with ``model`` on two ranks."""
    more = f"""
model = "{model}"
max_model_len = 512
engines.vllm.python = "{interpreter()}"
engines.vllm.kv_cache = "8 MiB"
"""
    async with started(folder, ready=True, engine="vllm", more=more) as daemon:
        yield daemon


async def post(daemon: Daemon, path: str, body: Json) -> Json:
    url = (await daemon.ask("/status"))["api_url"]
    async with aiohttp.ClientSession() as session, session.post(f"{url}{path}", json=body) as response:
        answer: Json = await response.json()
        assert response.status == 200, answer
    return answer


async def assert_only_a_replica_moves(daemon: Daemon, feature: str) -> None:
    """Another cut is refused in place, with the feature's name, and offered by a second instance."""
    layout = daemon.config.with_name("layout.json")
    layout.write_text(OTHER_CUT)
    code, out, err = await daemon.flexctl("--json", "rebalance", "--layout", str(layout), "--dry-run")
    assert code == 0, err
    proposal = json.loads(out)["proposal"]
    assert (proposal["way"], proposal["feasible"]) == ("replica", True)
    assert proposal["moves"] == [
        f"by a second instance on cpu:0, cpu:1, as moves in place are not supported with {feature}"
    ]


async def completion(daemon: Daemon, **body: Any) -> str:
    greedy = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    text: str = (await post(daemon, "/completions", {**greedy, **body}))["choices"][0]["text"]
    return text


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "feature"),
    [
        pytest.param(kinds.make_int8_llama, "quantisation (compressed-tensors)", id="int8"),
        pytest.param(kinds.make_gptq_llama, "quantisation (auto_gptq)", id="gptq"),
    ],
)
async def test_a_quantised_model_is_served(tmp_path: Path, make: Callable[[Path], Path], feature: str) -> None:
    model = make(CACHE / make.__name__.removeprefix("make_"))
    async with serving(tmp_path, model) as daemon:
        assert len(await completion(daemon)) > 0
        assert await completion(daemon) == await completion(daemon)
        stages = (await daemon.ask("/status"))["stages"]
        assert all(stage["weights_bytes"] > 0 and stage["kv_mapped_bytes"] > 0 for stage in stages)
        await assert_only_a_replica_moves(daemon, feature)


async def test_a_multimodal_model_sees_images(tmp_path: Path) -> None:
    async with serving(tmp_path, kinds.make_blip2(CACHE / "blip2")) as daemon:
        assert len(await completion(daemon)) > 0
        blind, red, blue = [await look_at(daemon, *colours) for colours in ((), (RED,), (BLUE,))]
        assert len({blind.text, red.text, blue.text}) == 3  # the image, not only its place, makes the answer
        assert red.prompt_tokens == blue.prompt_tokens == blind.prompt_tokens + kinds.IMAGE_TOKENS
        assert await look_at(daemon, RED) == red
        await assert_only_a_replica_moves(daemon, "multimodal models")
        await assert_a_killed_daemon_leaves_nothing(daemon)


async def assert_a_killed_daemon_leaves_nothing(daemon: Daemon) -> None:
    directory, pids = run_directory_of(daemon.process.pid), descendants(daemon.process.pid)
    assert len(pids) >= 2 + 2 + 2  # ranks, their helpers, API server and engine core
    shared = shared_memory(directory)
    daemon.process.kill()
    await daemon.process.wait()
    await until(lambda: not any(runs(pid) for pid in pids), timeout_s=60.0)
    sweep(directory.parent)
    assert not directory.exists()
    assert [path for path in shared if path.exists()] == []


RED, BLUE = (255, 0, 0), (0, 0, 255)


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer, and how long the prompt was."""

    text: str
    prompt_tokens: int


async def look_at(daemon: Daemon, *colours: tuple[int, int, int]) -> Seen:
    """Ask about images of one colour each."""
    images = [{"type": "image_url", "image_url": {"url": _png(colour)}} for colour in colours]
    messages = [{"role": "user", "content": [*images, {"type": "text", "text": "Which colour?"}]}]
    body = {"messages": messages, "max_tokens": 16, "temperature": 0}
    answer = await post(daemon, "/chat/completions", body)
    return Seen(answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"])


def _png(colour: tuple[int, int, int]) -> str:
    """Return an image of one colour as a data URL."""
    size = kinds.IMAGE_SIZE

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(colour) * size) * size)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
