"""Objects that live as long as the process."""

import gc
from typing import Final

# New objects until the collector looks through them: among those of requests under way it would find none dead.
_NEW_OBJECTS: Final = (20_000, 10, 10)


def settle() -> None:
    """Take what is there now out of what the garbage collector looks through, once a process is about to serve.

    Modules, routes and tables are a hundred thousand objects or so: each full collection would go through them in
    vain, and the event loop waits meanwhile.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_NEW_OBJECTS)
