"""Two pipeline ranks of two tensor-parallel ranks each serve; layers do not move between them in place."""

import pytest

from engines.errors import RefactoringRefused
from tests.support.sglang import running
from tests.support.vllm import devices, llama
from tests.vllm.streams import assert_same, move, on_pairs, run_streams

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_tensor_parallel_ranks_serve_and_moves_are_refused_by_name() -> None:
    options = {"tensor_parallel": 2, "device_ids": devices(2, tensor_parallel=2)}
    async with running(llama(), on_pairs(4), ranks=2, **options) as engine:
        assert_same(await run_streams(engine, count=4), await run_streams(engine, count=4))
        assert not engine.capabilities.refactors_in_place
        with pytest.raises(RefactoringRefused, match="not supported with tensor parallelism"):
            await move(engine, on_pairs(2))
        assert (await engine.check_refactor(on_pairs(2))).needs_replica
