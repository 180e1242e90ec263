"""Objects that live as long as the process."""

import gc


def settle() -> None:
    """Take what is there now out of what the garbage collector looks through, once a process is about to serve.

    Modules, routes and tables are a hundred thousand objects or so: each full collection would go through them in
    vain, and the event loop waits meanwhile.
    """
    gc.collect()
    gc.freeze()
