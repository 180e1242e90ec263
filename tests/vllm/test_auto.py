"""The daemon adapts by itself, with vLLM: a burst moves layers to ranks that had none, and calm moves them back."""

from pathlib import Path

import pytest

from tests.support.bursts import AUTO, changes_on_ranks_that_stay
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]


async def test_a_burst_changes_the_layout_of_vllm_and_calm_changes_it_back(tmp_path: Path) -> None:
    more = f'{AUTO}[engines.vllm]\npython = "{interpreter()}"\nthreads = 4\nkv_cache = "32 MiB"\n'
    await changes_on_ranks_that_stay(tmp_path, engine="vllm", ranks=4, more=more)
