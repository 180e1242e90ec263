"""Signals set flags and do nothing else."""

from flexpiped.signals import Signals


def test_the_second_stop_is_at_once_and_the_first_names_the_reason() -> None:
    signals = Signals()
    signals.ask_stop("SIGTERM")
    assert (signals.stop.is_set(), signals.stop_now.is_set()) == (True, False)

    signals.ask_stop("SIGINT")
    assert (signals.stop_now.is_set(), signals.stopped_by) == (True, "SIGTERM")
