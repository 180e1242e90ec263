"""One thread for all tests of this folder, and the attention kernel compiled once."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.native.kernels.build import build_kernels


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_kernels(directory=tmp_path_factory.mktemp("kernels"))
