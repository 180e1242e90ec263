"""The entry point that SGLang calls in each of its processes before anything else of it runs.

What is changed is changed in memory, in processes that a daemon started, and nowhere else: nothing is patched on disk.
"""

import os
import sys
from functools import wraps
from typing import Any

from flexpiped_served.processes import die_with_parent

from flexpiped_sglang.optional import has
from flexpiped_sglang.settings import Settings


def register() -> None:
    """Prepare this process. SGLang calls it once in each."""
    if not Settings.present():
        return
    die_with_parent(parent_pid=os.getppid())
    settings = Settings.of_environment()
    _serve_on_a_socket(str(settings.directory / "http.sock"))
    from flexpiped_sglang.idling import sleep_briefly
    from flexpiped_sglang.penalties import go_on_counting
    from flexpiped_sglang.seeds import draw_by_seed

    resumes_seeded = has(draw_by_seed, without="a seeded draw goes on differently after a replay")
    has(go_on_counting, without="penalties of output begin anew after a replay")
    has(sleep_briefly, without="a move through idle schedulers takes seconds")
    from flexpiped_sglang import internals

    if not internals.check():
        from flexpiped_sglang.layers import record_layers
        from flexpiped_sglang.starting import keep_first_layers

        record_layers()
        keep_first_layers(settings)
    _extend_scheduler(settings, resumes_seeded=resumes_seeded)


def _serve_on_a_socket(path: str) -> None:
    """Have the API server listen on a private Unix socket, not on a port: SGLang has no option for it."""
    import uvicorn

    original = uvicorn.Config.__init__

    @wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "uds": path})
        server = sys.modules.get("sglang.srt.entrypoints.http_server")
        if server is not None:
            # It would ask the port, and fail with a long traceback: the daemon asks the socket.
            server._freeze_gc_after_server_warmup = lambda _server_args: None  # type: ignore[attr-defined]

    uvicorn.Config.__init__ = init


def _extend_scheduler(settings: Settings, *, resumes_seeded: bool) -> None:
    """Give each scheduler a rank of ours, from when it is ready until it ends."""
    from sglang.srt.managers.scheduler import Scheduler

    from flexpiped_sglang.rank import Rank

    original = Scheduler.run_event_loop

    @wraps(original)
    def run_event_loop(self: Any) -> None:
        os.nice(max(0, settings.nice - os.nice(0)))
        self.flexpiped = Rank(self, settings, resumes_seeded=resumes_seeded)
        original(self)

    Scheduler.run_event_loop = run_event_loop
