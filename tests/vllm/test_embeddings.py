"""Real vLLM that only embeds, behind the daemon."""

from pathlib import Path

import pytest

from tests.support.embeddings import serves_vectors
from tests.support.vllm import interpreter, llama

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]


async def test_a_model_that_only_embeds_is_served_and_moved(tmp_path: Path) -> None:
    more = f"""
engines.vllm.python = "{interpreter()}"
engines.vllm.kv_cache = "8 MiB"
engines.vllm.args = ["--runner", "pooling", "--convert", "embed"]
"""
    await serves_vectors(tmp_path, engine="vllm", model=llama(), more=more, stages=2)
