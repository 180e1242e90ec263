"""An SGLang that outlives its daemon: the next one adopts it, and no model is loaded again."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engines.install_sglang import SGLANG
from tests.engines.interpreter import ensure_there
from tests.support.adoption import records, through_several_daemons
from tests.support.vllm import llama

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where daemons live; engines that a test leaves are ended, as nobody else would for a while."""
    yield tmp_path
    for record in records(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(record["pid"], signal.SIGKILL)


async def test_daemons_come_and_go_and_it_stays_until_none_comes(folder: Path) -> None:
    python = ensure_there(SGLANG)
    more = f'model = "{llama()}"\ndtype = "float32"\n[engines.sglang]\npython = "{python}"\nkv_cache = "32 MiB"\n'
    await through_several_daemons(folder, engine="sglang", workers="sglang::scheduler", more=more)
