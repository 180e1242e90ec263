"""What all tests share: a word at the end about the tests that were left out, and why."""

from collections import Counter

import pytest

REASONS = {
    "long": "too long for the gate: make test-long",
    "gpu": "need a CUDA device",
    "engine": "boot a real engine: leave out ENGINES=none",
}
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        reason = next((REASONS[name] for name in REASONS if item.get_closest_marker(name)), "not asked for")
        item.config.stash[LEFT_OUT][reason] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.write_line(f"left out: {count} tests ({reason})")
