"""What the tests of the vLLM engine share."""

from pathlib import Path

import pytest

from engines.vllm.options import VllmOptions


@pytest.fixture
def options(tmp_path: Path) -> VllmOptions:
    (tmp_path / "model").mkdir()
    return VllmOptions(
        python="/opt/vllm/bin/python",
        model_directory=str(tmp_path / "model"),
        device_ids=("cpu:0", "cpu:1"),
        num_decoders=8,
        kv_bytes_per_token=512,
        kv_cache_bytes=8 * 512 * 32 * 100,
        dtype="float32",
    )
