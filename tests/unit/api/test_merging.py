"""Several streams as one: all that comes comes, and what ends one of them early ends all."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engines.closing import closing
from flexpiped.api.merging import merged


class Streams:
    """Streams of numbers, a few turns of the loop apart; ``open`` counts those that have begun and not ended."""

    def __init__(self) -> None:
        self.open = 0

    async def of(self, *items: Any, turns: int) -> AsyncIterator[Any]:
        self.open += 1
        try:
            for item in items:
                for _ in range(turns):
                    await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await asyncio.sleep(0)  # as an abort takes a turn
            self.open -= 1


async def collect(items: AsyncIterator[int], found: list[int]) -> None:
    async with closing(items) as closed:
        found += [item async for item in closed]


async def test_all_that_comes_comes_in_the_order_of_each() -> None:
    streams, found = Streams(), list[int]()
    await collect(merged([streams.of(1, 2, 3, turns=2), streams.of(10, 20, turns=3)]), found)
    assert [item for item in found if item < 10] == [1, 2, 3]
    assert [item for item in found if item >= 10] == [10, 20]
    assert streams.open == 0


async def test_an_error_of_one_ends_the_others() -> None:
    streams = Streams()
    one = merged([streams.of(1, ValueError("broken"), turns=5), streams.of(*range(100), turns=5)])
    with pytest.raises(ValueError, match="broken"):
        await collect(one, [])
    assert streams.open == 0


async def test_closing_it_closes_all() -> None:
    streams = Streams()
    async with closing(merged([streams.of(*range(9), turns=3) for _ in range(5)])) as items:
        await anext(items)
        assert streams.open == 5
    assert streams.open == 0


async def test_a_reader_that_is_cancelled_closes_all() -> None:
    streams = Streams()
    one = merged([streams.of(*range(9), turns=10**6) for _ in range(3)])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await collect(one, [])
    assert streams.open == 0
