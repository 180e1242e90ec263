"""The engine changes between native, SGLang and vLLM while requests stream over HTTP: greedy text in fp32 stays."""

import re
from pathlib import Path

import aiohttp
import pytest

from tests.engines.install_sglang import SGLANG
from tests.engines.install_vllm import VLLM
from tests.engines.interpreter import ensure_there
from tests.support.daemon import started
from tests.support.engine_change import PROMPTS, TAKEN, Client, changed

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop]


async def through(folder: Path, *engines: str, more: str) -> None:
    """Begin with the first engine and change to each of the others under streams, whose text stays the same."""
    # one stage: the demo model ties its head to its embedding, and SGLang fails with that in several pipeline ranks
    more = f'dtype = "float32"\nmax_model_len = 2048\n{more}'
    async with (
        started(folder, ready=True, engine=engines[0], stages=1, more=more) as daemon,
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, (await daemon.ask("/status"))["api_url"])
        expected = {prompt: (await client.complete(prompt))[1] for prompt in PROMPTS}
        for engine in engines[1:]:
            async with client.busy(expected):
                assert re.fullmatch(TAKEN, await changed(daemon, engine, stages=1))
        assert (await client.complete("Once", min_p=0.1))[0] == (400 if engines[-1] == "native" else 200)


def sglang() -> str:
    return f'[engines.sglang]\npython = "{ensure_there(SGLANG)}"\nkv_cache = "32 MiB"\n'


async def test_streams_do_not_notice_that_sglang_serves_them(tmp_path: Path) -> None:
    await through(tmp_path, "native", "sglang", "native", more=sglang())


@pytest.mark.long
@pytest.mark.vllm
async def test_streams_go_from_sglang_to_vllm_and_back(tmp_path: Path) -> None:
    vllm = f'[engines.vllm]\npython = "{ensure_there(VLLM)}"\nkv_cache = "32 MiB"\n'
    await through(tmp_path, "sglang", "vllm", "sglang", more=sglang() + vllm)
