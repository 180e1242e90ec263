"""A downloaded directory of the shape of Qwen2.5-0.5B-Instruct, served by a configuration of one line."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.daemon import started
from tests.support.native import CACHE
from tests.support.qwen_checkpoint import REAL_SHAPE, SMALL_SHAPE, make_qwen

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

QUESTION: Any = [{"role": "user", "content": "What is <tool_call> in Straße 7?"}]
TOKENS = 48


@pytest.mark.parametrize(
    "shape", [SMALL_SHAPE, pytest.param(REAL_SHAPE, marks=pytest.mark.long)], ids=["small", "0.5B"]
)
async def test_one_line_serves_a_downloaded_qwen(shape: Mapping[str, int], tmp_path: Path) -> None:
    """Chats by its own template, in its own dtype, and goes on unchanged while its layers move.

    The lines beside that of the model say the defaults, and where this test finds the daemon.
    """
    directory = make_qwen(CACHE / f"qwen-{shape['hidden_size']}", shape=shape)
    async with started(tmp_path, ready=True, engine="native", more=f'model = "{directory}"\n') as daemon:
        status = await daemon.ask("/status")
        async with openai.AsyncOpenAI(base_url=status["api_url"], api_key="none", max_retries=0) as client:
            undisturbed, usage = await chat(client, model=directory.name)
            assert undisturbed.strip()
            assert usage.prompt_tokens == len(prompt_by_transformers(directory))
            assert usage.completion_tokens == TOKENS
            assert await constrained(client, model=directory.name) in ("yes", "no")
            streaming = asyncio.create_task(chat(client, model=directory.name))
            code, _, err = await daemon.flexctl("rebalance", "--stages", "4", "--wait")
            assert code == 0, err
            assert (await streaming)[0] == undisturbed
            assert (await chat(client, model=directory.name))[0] == undisturbed
        assert len((await daemon.ask("/status"))["stages"]) == 4


async def chat(client: openai.AsyncOpenAI, *, model: str) -> tuple[str, openai.types.CompletionUsage]:
    """Stream a greedy answer; return it, and what was counted."""
    chunks = await client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    parts = [chunk async for chunk in chunks]
    usage = parts[-1].usage
    assert usage is not None
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices), usage


async def constrained(client: openai.AsyncOpenAI, *, model: str) -> str:
    """Ask for one of two words: the rows of the table without a token, and the added tokens, must not be chosen."""
    schema: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"enum": ["yes", "no"]}}}
    answer = await client.chat.completions.create(
        model=model, messages=QUESTION, temperature=1.0, seed=1, max_tokens=16, response_format=schema
    )
    return str(json.loads(answer.choices[0].message.content or ""))


def prompt_by_transformers(directory: Path) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)  # type: ignore[no-untyped-call]
    found: list[int] = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    return found
