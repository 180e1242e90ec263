"""Real SGLang that only embeds, behind the daemon."""

from pathlib import Path

import pytest

from tests.support.embeddings import serves_vectors
from tests.support.sglang import interpreter
from tests.support.vllm import llama

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_a_model_that_only_embeds_is_served(tmp_path: Path) -> None:
    more = f"""
engines.sglang.python = "{interpreter()}"
engines.sglang.kv_cache = "8 MiB"
engines.sglang.args = ["--is-embedding"]
"""
    await serves_vectors(tmp_path, engine="sglang", model=llama(), more=more, stages=1)
