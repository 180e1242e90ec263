"""Schedulers that have nothing to do sleep, but not for long: a move goes slot by slot through an idle engine, too.

SGLang's own choice is to poll for requests all the time, or to look at nothing else for a second. A request wakes it
either way.
"""

import inspect
from functools import wraps
from typing import Any

from flexpiped_sglang.optional import expect

_IDLE_MS = 10


def sleep_briefly() -> None:
    """Bound how long a scheduler waits for its next request before it goes through its slots again.

    Raises:
        ImportError, AttributeError: Nothing is changed: this SGLang waits in another way.
    """
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    expect("self.poller.poll(" in inspect.getsource(IdleSleeper.maybe_sleep), "idle schedulers wait in another way")
    original = IdleSleeper.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        poll = self.poller.poll
        self.poller.poll = lambda timeout_ms: poll(min(timeout_ms, _IDLE_MS))

    IdleSleeper.__init__ = init
