"""Quantities as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topology.units import GIB, KIB, MIB, format_bytes, format_bytes_apart, format_bytes_of, plural


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (812 * KIB, "812 KiB"),
        (int(4.3 * MIB), "4.3 MiB"),
        (96 * MIB, "96 MiB"),
        (MIB - 1, "1 MiB"),  # not 1024 KiB
        (141 * GIB, "141 GiB"),
        (3000 * GIB, "2.9 TiB"),
        (-5 * MIB, "-5 MiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (9 * MIB, 96 * MIB, "9 of 96 MiB"),
        (0, 96 * MIB, "0 of 96 MiB"),
        (97 * MIB, 96 * MIB, "97 of 96 MiB"),
        (96 * MIB + 200 * KIB, 96 * MIB, "96.2 of 96 MiB"),
        (96 * MIB + 100, 96 * MIB, "96.0001 of 96 MiB"),
        (96 * MIB + 1, 96 * MIB, "100663297 of 100663296 B"),
        (300 * GIB + 1, 300 * GIB, "322122547201 of 322122547200 B"),
        (5, 5, "5 of 5 B"),
    ],
)
def test_format_bytes_of(part: int, whole: int, text: str) -> None:
    assert format_bytes_of(part, whole) == text


@given(first=st.integers(0, 1 << 44), second=st.integers(0, 1 << 44))
def test_amounts_that_differ_are_written_differently(first: int, second: int) -> None:
    texts = format_bytes_apart(first, second)
    assert (texts[0] == texts[1]) == (first == second)
    left, right = format_bytes_of(first, second).split(" of ")
    assert (left == right.split()[0]) == (first == second)


def test_plural() -> None:
    assert (plural(1, "stage"), plural(2, "stage")) == ("1 stage", "2 stages")
