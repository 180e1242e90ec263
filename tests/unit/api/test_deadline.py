"""A scope that keeps to a deadline, in virtual time; over sockets: ``test_access.py``, ``test_unread.py``."""

import asyncio
import math

import pytest

from flexpiped.api.deadline import InTime
from flexpiped.api.errors import ApiError


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def test_what_takes_longer_is_refused_at_the_deadline() -> None:
    began_s = now_s()
    with pytest.raises(ApiError, match="not complete when X-Request-Deadline-Ms had passed") as caught:
        async with InTime(began_s + 5.0):
            await asyncio.sleep(60.0)

    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (503, "deadline_exceeded", 1)
    assert now_s() - began_s == pytest.approx(5.0, abs=0.1)


@pytest.mark.parametrize("within_s", [5.0, math.inf])
async def test_what_is_in_time_is_left_alone(within_s: float) -> None:
    async with InTime(now_s() + within_s):
        await asyncio.sleep(4.0)
    await asyncio.sleep(60.0)


async def test_the_timeout_of_something_else_stays_that() -> None:
    with pytest.raises(TimeoutError):
        async with InTime(now_s() + 5.0), asyncio.timeout(1.0):
            await asyncio.sleep(60.0)
