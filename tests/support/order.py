"""The order of the tests of one engine that is shared: it boots once, beside no other, and what ends it comes last."""

from pathlib import Path

import pytest


def put_sharers_last(items: list[pytest.Item], folder: Path, *, shared: str, ends: str) -> None:
    """Sort the tests of ``folder``: those that boot engines of their own, those that share one, those that end it.

    Args:
        shared: The fixture that is the shared engine.
        ends: The fixture of a test that ends it.
    """

    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ()) if item.path.parent == folder else ()
        return 2 if ends in names else int(shared in names)

    items.sort(key=place)
