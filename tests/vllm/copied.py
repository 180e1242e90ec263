"""A stream that leaves one vLLM for another with its KV cache, and what shows that the copy matters."""

from dataclasses import replace

from engines.closing import closing
from engines.offers import KvParcel
from engines.vllm.adapter import VllmEngine
from tests.vllm.streams import collect, stream

ENDLESS = 16000  # tokens of a stream of ``roomy_llama`` that is to run until it is told to end
_BEFORE, _AFTER = 40, 24  # tokens at the first vLLM, and at the second


async def copied_by_hand(first: VllmEngine, second: VllmEngine, *, salt: int) -> list[int]:
    """Return the tokens of a stream that leaves one engine for the other with its KV cache, as a handover does it.

    The first engine would go on for long: however late it hears of the export, the stream has not ended by itself.
    """
    wanted = replace(stream(3, max_tokens=ENDLESS, salt=salt), request_id=f"by-hand-{salt}")
    tokens: list[int] = []
    parcel: KvParcel | None = None
    async with closing(first.generate(wanted)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            if len(tokens) >= _BEFORE:
                parcel = await first.export_kv(wanted.request_id)
                break
    assert parcel is not None
    await second.accept_kv(parcel)
    enough = replace(wanted.sampling, max_tokens=len(tokens) + _AFTER)
    rest, _ = await collect(second, replace(wanted, sampling=enough, generated_token_ids=tuple(tokens), kv=parcel))
    await second.forget_kv(parcel)
    await first.forget_kv(parcel)
    assert not parcel.directory.exists()
    return tokens + rest


async def assert_copy_is_exact_and_needed(first: VllmEngine, second: VllmEngine) -> None:
    """With the copy left out the output differs: else streams that go over with it would show nothing."""
    workers = range(len(second.pids["workers"]))
    for salt, is_copied in ((7, True), (8, False)):
        if not is_copied:
            for rank in workers:
                await second.arm_failpoint("worker.kv_in", "skip", rank=rank)
        tokens = await copied_by_hand(first, second, salt=salt)
        undisturbed, _ = await collect(first, stream(3, max_tokens=len(tokens), salt=salt))
        assert (tokens == undisturbed) == is_copied
    for rank in workers:
        await second.arm_failpoint("", "", rank=rank)
