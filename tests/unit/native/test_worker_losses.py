"""Workers that keep dying: a pure count."""

from engines.native.worker_losses import WorkerLosses


def test_last_words_belong_to_one_death() -> None:
    losses = WorkerLosses(2)
    losses.said(1, "out of memory")

    assert losses.ended(0, "exited with 1", now_s=0.0) == "exited with 1"
    assert losses.ended(1, "exited with 1", now_s=0.0) == "exited with 1: out of memory"
    assert losses.ended(1, "was killed", now_s=1.0) == "was killed"


def test_ten_deaths_a_worker_within_a_minute_are_borne_and_one_more_is_not() -> None:
    losses = WorkerLosses(2)
    for each in range(20):
        losses.ended(0, "was killed", now_s=float(each))
    assert not losses.are_too_many

    losses.ended(1, "was killed", now_s=20.0)
    assert losses.are_too_many


def test_deaths_of_more_than_a_minute_ago_do_not_count() -> None:
    losses = WorkerLosses(1)
    for each in range(11):
        losses.ended(0, "was killed", now_s=7.0 * each)

    assert not losses.are_too_many
