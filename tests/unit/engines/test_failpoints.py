"""Failpoints: off they do nothing; armed they fire where they are named."""

import pytest

from engines.failpoints import FailAction, FailpointHit, Failpoints


def test_nothing_is_armed_at_first() -> None:
    assert not Failpoints().hit("core.commit")


def test_raise_fires_once_and_names_the_place() -> None:
    failpoints = Failpoints()
    failpoints.arm("core.commit", FailAction.RAISE)
    assert not failpoints.hit("core.sync")
    with pytest.raises(FailpointHit, match=r"failpoint core\.commit"):
        failpoints.hit("core.commit")
    assert not failpoints.hit("core.commit")


def test_skip_fires_until_disarmed() -> None:
    failpoints = Failpoints()
    failpoints.arm("worker.copy_out", FailAction.SKIP)
    assert failpoints.hit("worker.copy_out")
    assert failpoints.hit("worker.copy_out")
    failpoints.disarm()
    assert not failpoints.hit("worker.copy_out")


def test_several_are_armed_at_once_and_disarmed_together() -> None:
    failpoints = Failpoints()
    failpoints.arm("a", FailAction.SKIP)
    failpoints.arm("b", FailAction.RAISE)
    assert failpoints.hit("a")
    failpoints.disarm()
    assert not failpoints.hit("a")
    assert not failpoints.hit("b")


@pytest.mark.parametrize("action", FailAction)
def test_actions_travel_by_their_value(action: FailAction) -> None:
    assert FailAction(action.value) is action
