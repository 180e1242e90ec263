"""An SGLang of a version that nobody has tried moves in place with: all else of it serves."""

from pathlib import Path

import pytest

from tests.contract.contract_requests import assert_idle
from tests.support.adapters import generated, merged
from tests.support.sglang import posing_as, running
from tests.support.vllm import layout, llama
from tests.vllm.streams import run_streams, stream

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_it_serves_and_moves_in_place_only_are_refused(tmp_path: Path) -> None:
    python = posing_as("0.99.0", tmp_path / "environment")
    async with running(llama(), layout(4), ranks=2, python=python) as engine:
        found = await run_streams(engine, count=4, max_tokens=30)
        model = merged(llama(), None)
        prompts = [stream(index).prompt_token_ids for index in range(4)]
        assert [tokens for tokens, _ in found] == [generated(model, prompt, max_tokens=30) for prompt in prompts]
        await assert_idle(engine)

        assert not engine.capabilities.refactors_in_place
        check = await engine.check_refactor(layout(6))
        assert (check.feasible, check.needs_replica) == (False, True)
        assert check.sentences == ("moves in place are tested with SGLang 0.5.23; this is 0.99.0",)
