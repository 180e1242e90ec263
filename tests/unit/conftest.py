"""Time is virtual in unit tests, but for those that are marked ``real_loop``."""

import asyncio
from collections.abc import Callable

import pytest

from tests.support.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories(
    config: pytest.Config,  # noqa: ARG001
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    is_real = item.get_closest_marker("real_loop") is not None
    return {"real": asyncio.new_event_loop} if is_real else {"virtual": VirtualTimeLoop}
