"""Real vLLM behind two ingress processes: streams through each of them, over moves, a death and the end."""

from pathlib import Path

import pytest

from tests.support.two_ingresses import behind_two_ingresses
from tests.support.vllm import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.long]


async def test_streams_through_both_say_the_same_whatever_happens(tmp_path: Path) -> None:
    await behind_two_ingresses(tmp_path, engine="vllm", python=interpreter())
