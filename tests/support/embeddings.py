"""A model that only embeds, behind the daemon: what is expected of it, whichever engine runs it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flexpiped.api.forwarding import GENERATING_PATHS
from tests.support.daemon import Daemon, started

TEXTS = ("Once upon a time", "there was a dog", "x")
NOISE = 1e-5  # of elements of vectors of length 1, in float32


async def serves_vectors(folder: Path, *, engine: str, model: Path, more: str, stages: int) -> None:
    """Start a daemon whose engine is to embed; ask it for vectors, move layers, and ask for what it cannot do.

    Args:
        stages: With two, layers move; one stage has nowhere to move them to.
        more: Further lines of the configuration, which have the engine embed.
    """
    settings = f'model = "{model}"\ndtype = "float32"\nmax_model_len = 512\n{more}'
    async with started(folder, ready=True, engine=engine, stages=stages, more=settings) as daemon:
        url = str((await daemon.ask("/status"))["api_url"]).removesuffix("/v1")
        async with aiohttp.ClientSession(url) as session:
            async with session.get("/readyz") as answer:
                assert (answer.status, (await answer.json())["status"]) == (200, "ready")
            vectors = await _vectors(session, model.name)
            assert vectors == [pytest.approx(each, abs=NOISE) for each in reference(model, TEXTS)]
            if stages > 1:
                await _move(daemon)
            assert await _vectors(session, model.name) == [pytest.approx(each, abs=NOISE) for each in vectors]
            await _assert_nothing_is_generated(session, model.name)
            assert await _vectors(session, model.name) == [pytest.approx(each, abs=NOISE) for each in vectors]
            async with session.get("/metrics") as answer:
                assert 'flexpiped_requests_total{endpoint="engine",outcome="done"} 3.0' in await answer.text()


async def _vectors(session: aiohttp.ClientSession, model: str) -> list[list[float]]:
    async with session.post("/v1/embeddings", json={"model": model, "input": list(TEXTS)}) as answer:
        body = await answer.json()
        assert (answer.status, body["object"]) == (200, "list"), body
        assert Path(body["model"]).name == model  # SGLang says its directory
        assert body["usage"]["prompt_tokens"] > len(TEXTS)
        return [each["embedding"] for each in sorted(body["data"], key=lambda each: int(each["index"]))]


async def _move(daemon: Daemon) -> None:
    layout = daemon.config.with_name("layout.json")
    layout.write_text(
        '{"stages": [{"devices": ["cpu:0"], "decoders": [0, 2]}, {"devices": ["cpu:1"], "decoders": [2, 8]}]}'
    )
    code, out, err = await daemon.flexctl("rebalance", "--layout", str(layout), "--wait")
    assert code == 0, out + err
    assert (await daemon.ask("/status"))["epoch"] == 1


async def _assert_nothing_is_generated(session: aiohttp.ClientSession, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "prompt": "x",
        "input": "x",
        "messages": [{"role": "user", "content": "x"}],
    }
    for path in ("/v1/completions", "/v1/chat/completions", *GENERATING_PATHS):
        async with session.post(path, json=asked) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (404, "model_does_not_generate"), (path, error)
            assert f"{model} generates nothing" in error["message"]


def reference(model: Path, texts: Sequence[str]) -> list[list[float]]:
    """Return by transformers what both engines make of a text: the last token's state, of length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    runs = AutoModel.from_pretrained(model, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for text in texts:
            last = runs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            found.append((last / last.norm()).tolist())
    return found
