"""Failpoints for tests: a name armed with an action goes off once where the code passes it."""

import os
import signal
import time

FAIL, KILL, SKIP, SLOW, STALL = "fail", "kill", "skip", "slow", "stall"
_SLOW_S = 0.3
_STALL_S = 3600.0


class FailpointHit(RuntimeError):
    """An armed failpoint was passed."""


class Failpoints:
    """Those of one process."""

    def __init__(self) -> None:
        self._armed: dict[str, str] = {}

    def arm(self, name: str, action: str) -> None:
        """Arm one; an empty name disarms all."""
        if name:
            self._armed[name] = action
        else:
            self._armed.clear()

    def hit(self, name: str) -> bool:
        """Pass a failpoint. Return True when what follows is to be left out; or raise, die, wait or stall, as armed."""
        action = self._armed.pop(name, None)
        if action is None:
            return False
        if action == SKIP:
            self._armed[name] = action  # a control leaves it out each time
            return True
        if action == SLOW:
            time.sleep(_SLOW_S)
            return False
        if action == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == STALL:
            time.sleep(_STALL_S)
        raise FailpointHit(f"failpoint {name}")
