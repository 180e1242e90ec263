"""Restarts are delayed more and more, and end."""

import pytest

from engines.restarts import GiveUp, Restart, RestartPolicy, after_death

POLICY = RestartPolicy(max_deaths=4, window_s=100.0, first_delay_s=1.0, max_delay_s=3.0)


@pytest.mark.parametrize(
    ("deaths_s", "decision"),
    [
        pytest.param((5.0,), Restart(after_s=1.0), id="first"),
        pytest.param((5.0, 6.0), Restart(after_s=2.0), id="doubled"),
        pytest.param((5.0, 6.0, 7.0), Restart(after_s=3.0), id="bounded"),
        pytest.param((5.0, 6.0, 7.0, 8.0), GiveUp(reason="died 4 times within 100 s"), id="given up"),
        pytest.param((5.0, 6.0, 7.0, 106.0), Restart(after_s=2.0), id="old deaths do not count"),
        pytest.param((5.0, 105.0), Restart(after_s=1.0), id="the window is half open"),
    ],
)
def test_after_death(deaths_s: tuple[float, ...], decision: Restart | GiveUp) -> None:
    assert after_death(deaths_s, policy=POLICY) == decision
