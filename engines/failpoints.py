"""Named places where a test can make a process fail. Off, a failpoint costs one dictionary look-up.

Armed by name with an action; each fires once, unless the action says otherwise.
"""

import os
import signal
import time
from enum import Enum


class FailAction(Enum):
    RAISE = "raise"  # an error at this place
    KILL = "kill"  # the process dies as by kill -9
    STALL = "stall"  # the process hangs here for a minute
    SKIP = "skip"  # the step is silently left out, until disarmed: only for controls that must then fail


class FailpointHit(Exception):
    """Raised by an armed failpoint."""


class Failpoints:
    """The failpoints of one process."""

    def __init__(self) -> None:
        self._armed: dict[str, FailAction] = {}

    def arm(self, name: str, action: FailAction) -> None:
        self._armed[name] = action

    def disarm(self) -> None:
        self._armed.clear()

    def hit(self, name: str) -> bool:
        """Do what is armed for ``name``. True when the caller must leave its step out.

        Raises:
            FailpointHit: RAISE is armed.
        """
        if not self._armed:
            return False
        action = self._armed.get(name)
        if action is None:
            return False
        if action is FailAction.SKIP:
            return True
        del self._armed[name]
        if action is FailAction.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if action is FailAction.STALL:
            time.sleep(60.0)
            return False
        raise FailpointHit(f"failpoint {name}")
