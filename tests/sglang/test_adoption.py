"""An SGLang that outlives its daemon: the next one adopts it, and no model is loaded again."""

from pathlib import Path

import pytest

from tests.support.adoption import through_several_daemons
from tests.support.sglang import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_daemons_come_and_go_and_it_stays_until_none_comes(tmp_path: Path) -> None:
    """``tests/unit/vllm/test_outliving.py`` is the short form, with processes that only sleep."""
    await through_several_daemons(tmp_path, engine="sglang", python=interpreter(), workers="sglang::scheduler")
