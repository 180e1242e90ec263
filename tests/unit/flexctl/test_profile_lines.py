"""What ``flexctl profile`` shows, and that the other commands start without what it needs."""

import subprocess
import sys

from engines.native.timing_messages import TimingPoint
from flexpiped.flexctl.profile_lines import profile_lines, progress_line
from tests.unit.planner.test_profile import observed, profile_of


def test_progress_says_what_and_how_long() -> None:
    point = TimingPoint(done=30, what="2 stages, side by side: 8 x 1 token of 1024", stages=())
    line = progress_line(point, of=120, elapsed_s=12.0)
    assert line == "#####...............  30/120  2 stages, side by side: 8 x 1 token of 1024   36.0 s left"


def test_terms_and_residuals_fit_a_terminal() -> None:
    lines = profile_lines(profile_of(*observed(), *observed(beside=True), *observed(threads=2)))
    assert lines[0].startswith("small-llama: measured 2026-01-02 03:04 UTC on Some CPU")
    assert all(len(line) <= 80 for line in lines)
    assert any(line.split() == ["1", "thread", "1", "thread*", "2", "threads"] for line in lines)
    assert lines[-1] == "  * while other stages compute on the same host"
    assert any(line.split() == ["decoder,", "each", "call", "300", "us", "300", "us", "300", "us"] for line in lines)
    assert any("mean residual" in line and line.count("0.0%") == 3 for line in lines)


def test_high_residuals_are_warned_of_last() -> None:
    lines = profile_lines(profile_of(*observed(), *observed(noise=0.3, beside=True)))
    assert all(len(line) <= 80 for line in lines)
    at = lines.index("  * while other stages compute on the same host")
    text = " ".join(line.strip() for line in lines[at + 1 :])
    assert text.startswith("warning: mean residual 2")
    assert text.endswith("predictions may be as far off; measure again while nothing else runs")
    assert not any("warning" in line for line in profile_lines(profile_of(*observed())))


def test_many_fits_stand_in_several_tables() -> None:
    many = [each for threads in range(1, 8) for each in observed(threads=threads)]
    lines = profile_lines(profile_of(*many))
    assert all(len(line) <= 80 for line in lines)
    assert sum("mean residual" in line for line in lines) == 4  # three tables, and the source


def test_other_commands_import_neither_numpy_nor_the_planner() -> None:
    code = (
        "import sys; from flexpiped.flexctl.parser import flexctl_parser; flexctl_parser(); "
        "print([name for name in ('numpy', 'planner', 'engines', 'msgspec', 'asyncio') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
