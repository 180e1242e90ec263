"""Which vLLM an interpreter has."""

import sys
from pathlib import Path

import pytest

from engines.errors import EngineStartFailed, UnsupportedByEngine
from engines.vllm.interpreter import vllm_version
from tests.support.fake_vllm import fake_interpreter

pytestmark = pytest.mark.real_loop


async def test_the_version_is_read(tmp_path: Path) -> None:
    assert await vllm_version(fake_interpreter(tmp_path, version="0.33.1+cpu")) == "0.33.1+cpu"


async def test_an_interpreter_without_vllm() -> None:
    with pytest.raises(UnsupportedByEngine, match="has no vLLM: install it there"):
        await vllm_version(sys.executable)


async def test_no_interpreter_is_named() -> None:
    with pytest.raises(UnsupportedByEngine, match=r"needs engines\.vllm\.python"):
        await vllm_version("")


async def test_a_vllm_that_is_too_old(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByEngine, match=r"has vLLM 0\.11\.2: 0\.32 or newer is needed"):
        await vllm_version(fake_interpreter(tmp_path, version="0.11.2"))


async def test_a_version_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByEngine, match="no version that can be compared"):
        await vllm_version(fake_interpreter(tmp_path, version="dev"))


async def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(EngineStartFailed, match=r"there is no .*nowhere"):
        await vllm_version(str(tmp_path / "nowhere"))


async def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("text")
    with pytest.raises(EngineStartFailed, match=r"cannot run .*Permission denied"):
        await vllm_version(str(tmp_path / "python"))


async def test_one_that_says_something_else(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho it is broken\n")
    script.chmod(0o755)
    with pytest.raises(EngineStartFailed, match="does not say which vLLM it has: it is broken"):
        await vllm_version(str(script))


async def test_one_that_does_not_answer(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    with pytest.raises(EngineStartFailed, match=r"did not answer within 0\.2 s"):
        await vllm_version(str(script), deadline_s=0.2)
