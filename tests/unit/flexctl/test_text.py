"""How numbers are written."""

import pytest

from flexpiped.flexctl.text import Colour, Paint, bar, format_age, format_duration, format_latency, table


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.0, "0.0 ms"), (0.0031, "3.1 ms"), (0.038, "38 ms"), (0.0999, "0.10 s"), (0.11, "0.11 s"), (2.44, "2.4 s")],
)
def test_durations(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


def test_a_long_duration_is_written_as_an_age() -> None:
    assert format_duration(75) == "1 min"


@pytest.mark.parametrize(
    ("duration_s", "text"), [(0.0041, "4.1 ms"), (0.021, "21 ms"), (1.234, "1234 ms"), (12.3, "12 s")]
)
def test_latencies(duration_s: float, text: str) -> None:
    assert format_latency(duration_s) == text


@pytest.mark.parametrize(
    ("duration_s", "text"), [(-1, "0 s"), (12.9, "12 s"), (125, "2 min"), (11_520, "3 h 12 min"), (349_200, "4 d 1 h")]
)
def test_ages(duration_s: float, text: str) -> None:
    assert format_age(duration_s) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "...."), (1, 1000, "#..."), (999, 1000, "###."), (10, 10, "####"), (12, 10, "####"), (1, 0, "....")],
)
def test_bars_show_anything_above_nothing_and_fill_only_when_full(part: int, whole: int, text: str) -> None:
    assert bar(part, whole, width=4) == text


def test_columns_align_without_trailing_space() -> None:
    assert table([("a", "bb"), ("ccc", "d")], gap=" ") == ["  a   bb", "  ccc d"]


def test_colour_never_changes_the_words() -> None:
    assert Paint(enabled=False)("ready", Colour.GREEN) == "ready"
    assert Paint(enabled=True)("ready", Colour.GREEN) == "\x1b[32mready\x1b[0m"
