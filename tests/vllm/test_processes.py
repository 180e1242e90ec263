"""The processes of real vLLM: alone in their environment, and not left behind by a start that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import EngineStartFailed
from engines.vllm.adapter import VllmEngine
from engines.vllm.command import environment
from tests.support.vllm import graph_of, interpreter, layout, llama, options_for

pytestmark = [pytest.mark.engine, pytest.mark.vllm, pytest.mark.real_loop]

ROOT = Path(__file__).parents[2]


def test_nothing_of_the_daemon_can_be_imported_there(tmp_path: Path) -> None:
    options = options_for(llama(), ranks=1)
    env = environment(
        options,
        counts=(8,),
        run_dir=tmp_path,
        inherited=dict(os.environ) | {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix},
        daemon_prefix=sys.prefix,
        cores=1,
    )
    names = ("flexpiped", "engines", "planner", "topology", "structlog", "ortools", "vllm", "flexpiped_vllm")
    probe = f"import importlib.util as u; print(*[n for n in {names!r} if u.find_spec(n)])"
    found = subprocess.run(
        [interpreter(), "-c", probe], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["vllm", "flexpiped_vllm"]


@pytest.mark.long
async def test_memory_that_vllm_does_not_get_is_an_error_in_its_words() -> None:
    """Where the daemon's own sums had let it pass."""
    options = options_for(llama(), ranks=1, kv_cache_bytes=1 << 46, device_memory_bytes=1 << 47)
    engine = VllmEngine(options, layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"(?i)memory"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()


async def test_a_model_that_vllm_refuses_is_refused_in_its_words() -> None:
    engine = VllmEngine(options_for(llama(), ranks=1, max_model_len=1_000_000), layout(), graph=graph_of(llama()))
    with pytest.raises(EngineStartFailed, match=r"max_model_len|maximum"):
        await engine.start(on_progress=lambda _message: None)
    assert not engine.run_directory.exists()
