"""What every resident rank answers the daemon beside its steps: status, failpoints, prepare, release, settle."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from flexpiped_served.failpoints import Failpoints
from flexpiped_served.moving import Moving
from flexpiped_served.processes import lower_this_thread, trim_heap
from flexpiped_served.side import Reply
from flexpiped_served.weights import HelperFailed

EXPECTED = (HelperFailed, RuntimeError, OSError, KeyError, ValueError)  # a failpoint is a RuntimeError
_PREPARING_NICE = 19


class RankAnswers:
    """The side of one rank. Called in the side channel's thread.

    Args:
        moving: Returns what moves layers, or raises RuntimeError that says why nothing does.
        status: Returns what the rank is and does.
        no_grad: Returns the context in which the engine has its tensors made.
    """

    def __init__(
        self,
        failpoints: Failpoints,
        *,
        moving: Callable[[], Moving],
        status: Callable[[], dict[str, Any]],
        no_grad: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._failpoints = failpoints
        self._moving = moving
        self._status = status
        self._no_grad = no_grad

    def answer(self, message: dict[str, Any], reply: Reply) -> None:
        """Answer one message, at once or later."""
        call = message.get("call")
        try:
            match message["op"]:
                case "status":
                    reply({"op": "reply", "call": call, "result": self._status()})
                case "arm":
                    self._failpoints.arm(message["name"], message["action"])
                    reply({"op": "reply", "call": call, "result": {}})
                case "prepare":
                    threading.Thread(target=self._prepare, args=(message, reply), daemon=True).start()
                case "settle":
                    self._moving().settle(parameters=message["parameters"])
                    trim_heap()
                    reply({"op": "reply", "call": call, "result": {}})
                case "release":
                    released = self._moving().release(message["handover"])
                    trim_heap()
                    reply({"op": "reply", "call": call, "result": released})
                case op:
                    reply({"op": "reply", "call": call, "error": f"unknown op {op!r}"})
        except EXPECTED as error:
            reply({"op": "reply", "call": call, "error": f"{type(error).__name__}: {error}"})

    def _prepare(self, message: dict[str, Any], reply: Reply) -> None:
        lower_this_thread(_PREPARING_NICE)
        call = message["call"]
        try:
            with self._no_grad():
                moving = self._moving()
                for weights_bytes in moving.prepare(message["handover"], message["layout"], message["new_layout"]):
                    reply({"op": "progress", "call": call, "weights_bytes": weights_bytes})
            reply({"op": "reply", "call": call, "result": {}})
        except EXPECTED as error:
            reply({"op": "reply", "call": call, "error": f"{type(error).__name__}: {error}"})
