"""A new vLLM has its first layers from the memory of the host, and its output is what it was (fp32)."""

import pytest

from tests.support.vllm import llama, running
from tests.vllm.streams import check_first_layers_are_kept

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop, pytest.mark.asyncio(loop_scope="session")]


@pytest.mark.long  # two starts
async def test_a_new_instance_has_its_layers_from_the_memory_of_the_host() -> None:
    await check_first_layers_are_kept(
        lambda pipeline, ranks, address: running(llama(), pipeline, ranks=ranks, parameters=address)
    )
