"""The core's copy of a LoRA adapter's files: it is what they were, or there is none."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from engines.errors import UnsupportedByEngine
from engines.native.adapter_copy import AdapterCopy
from engines.native.lora_files import files_in

WEIGHTS = bytes(range(256)) * (3 << 12)  # copied in several pieces


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(WEIGHTS)
    return tmp_path


async def test_it_stays_when_the_files_go(directory: Path) -> None:
    copy = AdapterCopy(files_in("sql", str(directory)))
    assert not copy.is_whole
    await copy.fill()
    assert copy.is_whole
    shutil.rmtree(directory)
    files = copy.files
    assert (files.config.read_text(), files.weights.read_bytes()) == ("{}", WEIGHTS)
    assert (files.name, files.directory) == ("sql", str(directory))
    descriptors = copy.descriptors
    copy.close()
    copy.close()
    assert copy.descriptors == ()
    for each in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(each)


async def test_files_that_change_meanwhile_are_refused(directory: Path) -> None:
    """Half of one version and half of another would be neither."""
    copy = AdapterCopy(files_in("sql", str(directory)))
    filling = asyncio.create_task(copy.fill())
    await asyncio.sleep(0)
    (directory / "adapter_model.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(UnsupportedByEngine, match="have changed while they were read"):
        await filling
    assert not copy.is_whole
    copy.close()


async def test_files_that_go_meanwhile_are_refused(directory: Path) -> None:
    copy = AdapterCopy(files_in("sql", str(directory)))
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedByEngine, match=r"adapter 'sql' in .*No such file"):
        await copy.fill()
    copy.close()
