"""KV caches that vLLMs transfer among themselves: what the daemon asks of either, and what it says when they cannot."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from engines.closing import closing
from engines.errors import KvTransferFailed
from engines.offers import KvParcel
from engines.protocol import GenerationRequest, SamplingParams
from engines.vllm.adapter import VllmEngine
from engines.vllm.sampling import to_vllm
from tests.support.fake_vllm import fake_engine

pytestmark = pytest.mark.real_loop
REQUEST = GenerationRequest(request_id="mine", prompt_token_ids=(10, 11), sampling=SamplingParams(max_tokens=60))


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[VllmEngine]:
    engine = fake_engine(tmp_path, behaviour="lends")
    await engine.start(on_progress=lambda _message: None)
    yield engine
    await engine.close()


async def lent(engine: VllmEngine) -> KvParcel:
    async with closing(engine.generate(REQUEST)) as chunks:
        async for _ in chunks:
            return await engine.export_kv("mine")
    raise AssertionError("no token came")


async def test_what_one_vllm_lends_another_borrows_by_its_tokens(engine: VllmEngine) -> None:
    parcel = await lent(engine)
    assert (parcel.num_tokens, parcel.num_bytes) == (3, 48)
    assert parcel.loan is not None
    assert parcel.loan["tokens"] == [10, 11, 2]
    assert parcel.loan["params"] == {"remote": f"flexpiped-{engine.pids['api']}-1"}
    await engine.accept_kv(parcel)
    await engine.forget_kv(parcel)
    assert not parcel.directory.exists()


async def test_the_request_itself_names_no_loan(engine: VllmEngine) -> None:
    parcel = await lent(engine)
    assert "extra_args" not in to_vllm(replace(REQUEST, kv=parcel), max_tokens=20)


async def test_what_cannot_be_read_is_said(engine: VllmEngine) -> None:
    parcel = await lent(engine)
    with pytest.raises(KvTransferFailed, match="NIXL is not there"):
        await engine.accept_kv(replace(parcel, loan={"tokens": [1], "params": {"remote": "nobody"}}))
    with pytest.raises(KvTransferFailed, match="it lies in files, and this vLLM transfers by NIXL"):
        await engine.accept_kv(replace(parcel, loan=None))


async def test_what_is_not_lent_is_said(engine: VllmEngine, tmp_path: Path) -> None:
    with pytest.raises(KvTransferFailed, match="the request has ended"):
        await engine.export_kv("mine")
    miser = fake_engine(tmp_path, behaviour="keeps")
    await miser.start(on_progress=lambda _message: None)
    with pytest.raises(KvTransferFailed, match="NIXL is not there"):
        await lent(miser)
    await miser.close()
