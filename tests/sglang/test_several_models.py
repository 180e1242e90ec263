"""A native model and an SGLang in one daemon: each is moved, stopped, started and swapped under streams of the other.

``tests/native/test_several_models.py`` has two native ones.
"""

from pathlib import Path

import pytest

from tests.support.several_models import beside_a_native_one
from tests.support.sglang import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_each_changes_under_streams_of_the_other_and_no_token_is_another_one(tmp_path: Path) -> None:
    await beside_a_native_one(tmp_path, engine="sglang", python=interpreter())
