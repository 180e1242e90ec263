"""``aclosing`` for what engines return: leaving the scope ends the request behind the iterator."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


def closing(items: AsyncIterator[T]) -> "aclosing[AsyncGenerator[T, None]]":
    """Return a scope that closes ``items`` on every path.

    Raises:
        TypeError: ``items`` cannot be closed, so it is not what the ``Engine`` protocol promises.
    """
    if not isinstance(items, AsyncGenerator):
        raise TypeError(f"{type(items).__name__} has no aclose")
    return aclosing(items)
