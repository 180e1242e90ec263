"""What a rank answers the daemon beside its steps, whatever its engine."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from queue import Queue
from typing import Any

import pytest

from engines.served.plugin_path import SHARED

sys.path.append(str(SHARED))  # as the interpreter of an engine has it

from flexpiped_served.answering import RankAnswers
from flexpiped_served.failpoints import Failpoints


class FakeMoving:
    """Loads two layers, of 10 bytes each."""

    def prepare(self, number: int, layout: list[int], new_layout: list[int]) -> Iterator[int]:  # noqa: ARG002
        yield 10
        if number == 13:
            raise ValueError("no such tensor")
        yield 20

    def settle(self, *, parameters: str) -> None:
        raise RuntimeError(f"it was settled for {parameters}")

    def release(self, number: int) -> dict[str, int]:
        return {"weights_bytes": 20, "kv_bytes": number}


def asked(message: dict[str, Any], *, moving: object = FakeMoving(), failpoints: Failpoints | None = None) -> list[Any]:
    """Return the answers to a message, up to the last."""

    def found() -> Any:
        if isinstance(moving, Exception):
            raise moving
        return moving

    answers = RankAnswers(failpoints or Failpoints(), moving=found, status=lambda: {"pid": 7}, no_grad=nullcontext)
    replies: Queue[dict[str, Any]] = Queue()
    answers.answer({"call": 3, **message}, replies.put)
    seen = [replies.get(timeout=5)]
    while seen[-1]["op"] != "reply":
        seen.append(replies.get(timeout=5))
    assert all(reply["call"] == 3 for reply in seen)
    return seen


SETTLE = {"op": "settle", "parameters": "a socket"}
PREPARE = {"op": "prepare", "handover": 1, "layout": [0, 1], "new_layout": [0, 0]}


def test_status_is_told() -> None:
    assert asked({"op": "status"})[-1]["result"] == {"pid": 7}


def test_a_preparation_tells_how_far_it_is() -> None:
    *progress, end = asked(PREPARE)
    assert [news["weights_bytes"] for news in progress] == [10, 20]
    assert end["result"] == {}


def test_a_preparation_that_fails_says_why() -> None:
    *progress, end = asked(PREPARE | {"handover": 13})
    assert [news["weights_bytes"] for news in progress] == [10]
    assert end["error"] == "ValueError: no such tensor"


def test_what_was_freed_is_told() -> None:
    assert asked({"op": "release", "handover": 5})[-1]["result"] == {"weights_bytes": 20, "kv_bytes": 5}


def test_what_a_daemon_that_is_gone_has_left_is_settled() -> None:
    assert asked(SETTLE)[-1]["error"] == "RuntimeError: it was settled for a socket"


@pytest.mark.parametrize("message", [PREPARE, {"op": "release", "handover": 1}, SETTLE])
def test_a_rank_whose_layers_stay_says_why(message: dict[str, Any]) -> None:
    assert asked(message, moving=RuntimeError("one pipeline rank"))[-1]["error"] == "RuntimeError: one pipeline rank"


def test_failpoints_are_armed() -> None:
    failpoints = Failpoints()
    asked({"op": "arm", "name": "worker.load", "action": "skip"}, failpoints=failpoints)
    assert failpoints.hit("worker.load")


def test_an_unknown_op_is_refused() -> None:
    assert asked({"op": "dance"})[-1]["error"] == "unknown op 'dance'"
