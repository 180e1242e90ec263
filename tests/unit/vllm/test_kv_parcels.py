"""KV caches in shared memory go away with their handover, with their vLLM, and after a daemon that was killed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from engines.closing import closing
from engines.errors import KvTransferFailed
from engines.offers import KvParcel, KvTransfers
from engines.protocol import GenerationRequest, SamplingParams
from engines.vllm.adapter import VllmEngine
from tests.support.fake_vllm import fake_engine

pytestmark = pytest.mark.real_loop
REQUEST = GenerationRequest(
    request_id="mine", prompt_token_ids=(10, 11), sampling=SamplingParams(max_tokens=60, logprobs=True)
)


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[VllmEngine]:
    engine = fake_engine(tmp_path)
    await engine.start(on_progress=lambda _message: None)
    yield engine
    await engine.close()


async def exported(engine: VllmEngine) -> KvParcel:
    async with closing(engine.generate(REQUEST)) as chunks:
        async for _ in chunks:
            return await engine.export_kv("mine")
    raise AssertionError("no token came")


def files_of(parcel: KvParcel) -> list[str]:
    return sorted(path.name for path in parcel.directory.iterdir()) if parcel.directory.exists() else []


async def test_a_parcel_lies_in_shared_memory_until_it_is_forgotten(engine: VllmEngine) -> None:
    assert isinstance(engine, KvTransfers)
    assert engine.capabilities.kv_form == "of a fake"
    parcel = await exported(engine)
    assert (parcel.num_tokens, parcel.num_bytes, files_of(parcel)) == (4, 64, ["layer.0"])
    assert parcel.directory.is_relative_to("/dev/shm")
    assert parcel.directory.stat().st_mode & 0o77 == 0
    await engine.accept_kv(parcel)
    await engine.forget_kv(parcel)
    await engine.forget_kv(parcel)
    assert files_of(parcel) == []


async def test_who_did_not_write_it_does_not_remove_it(engine: VllmEngine, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    parcel = KvParcel(directory=tmp_path / "theirs", num_tokens=1, num_bytes=1)
    await engine.accept_kv(parcel)
    await engine.forget_kv(parcel)
    assert parcel.directory.exists()


async def test_what_is_left_goes_with_the_engine(engine: VllmEngine) -> None:
    parcel = await exported(engine)
    listed = (engine.run_directory / "shared-memory").read_text().split()
    assert parcel.directory.parent.name in listed  # for who comes after a daemon that was killed
    await engine.close()
    assert not parcel.directory.parent.exists()
    await engine.forget_kv(parcel)


async def test_what_cannot_be_exported_leaves_nothing(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path, behaviour="miserly")
    await engine.start(on_progress=lambda _message: None)
    with pytest.raises(KvTransferFailed, match="it keeps its KV cache"):
        await exported(engine)
    (own,) = (name for name in (engine.run_directory / "shared-memory").read_text().split() if "flexpiped-kv" in name)
    assert list((Path("/dev/shm") / own).iterdir()) == []
    await engine.close()


async def test_a_request_that_has_ended_has_none(engine: VllmEngine) -> None:
    with pytest.raises(KvTransferFailed, match="the request has ended"):
        await engine.export_kv("mine")
