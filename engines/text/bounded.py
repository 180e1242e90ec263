"""Work that is a program of a model's author, a chat template, held to a time and to memory of its own.

One that does not end would keep every later request of the text process waiting, and one that doubles its text without
end would take the memory of the host.
"""

import ctypes
import faulthandler
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

RENDER_LIMIT_S: Final = 10.0
KILL_AFTER_S: Final = 30.0
RENDER_LIMIT_BYTES: Final = 1 << 30
_STDERR: Final = 2
_DATA_PAGES: Final = 5  # the field of /proc/self/statm that RLIMIT_DATA bounds
_raise_in_thread: Final = ctypes.pythonapi.PyThreadState_SetAsyncExc
T = TypeVar("T")


class TakesTooMuch(Exception):
    """Time or memory have run out; the message says which."""


class _TimeIsOver(BaseException):
    """Raised inside of what is running; no ``except Exception`` on the way up keeps it."""


class Bounds:
    """Holds one piece of work at a time, always of the same thread; its own thread looks on and sleeps meanwhile.

    Work is interrupted between two steps of the interpreter, after one to two times ``limit_s``. A single step that
    takes longer, as of numbers with a billion digits, lets no other thread run: after ``kill_after_s`` that ends the
    process, with a traceback on stderr.
    """

    def __init__(
        self,
        *,
        limit_s: float = RENDER_LIMIT_S,
        limit_bytes: int = RENDER_LIMIT_BYTES,
        kill_after_s: float = KILL_AFTER_S,
    ) -> None:
        self._limit_s = limit_s
        self._kill_after_s = kill_after_s
        self._limit_bytes = limit_bytes
        self._turn = threading.Lock()
        self._begun = threading.Event()
        self._count = 0
        self._thread_id: int | None = None  # while it works
        self._watch: threading.Thread | None = None

    def run(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns.

        Raises:
            TakesTooMuch
        """
        try:
            with _memory_limit(self._limit_bytes), self._time_limit():
                return work()
        except _TimeIsOver:
            raise TakesTooMuch(f"it takes longer than {self._limit_s:g} s") from None
        except MemoryError:
            raise TakesTooMuch(f"it takes more than {self._limit_bytes >> 20} MiB") from None

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """Have ``_TimeIsOver`` raised in this scope when its time is over, and at no time afterwards."""
        if self._watch is None:
            self._watch = threading.Thread(target=self._look_on, daemon=True, name="bounds")
            self._watch.start()
        self._count += 1
        self._thread_id = threading.get_ident()
        self._begun.set()
        faulthandler.dump_traceback_later(self._kill_after_s, exit=True, file=_STDERR)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            with self._turn:
                self._thread_id = None
                _raise_in_thread(ctypes.c_ulong(threading.get_ident()), None)  # what came too late to be raised

    def _look_on(self) -> None:
        while True:
            self._begun.wait()
            self._begun.clear()
            count = self._count
            time.sleep(self._limit_s)
            with self._turn:
                thread_id = self._thread_id
                if thread_id is not None and self._count == count:
                    self._thread_id = None  # once, also where it is raised on the way out
                    _raise_in_thread(ctypes.c_ulong(thread_id), ctypes.py_object(_TimeIsOver))
                elif thread_id is not None:  # something that began meanwhile
                    self._begun.set()


@contextmanager
def _memory_limit(limit_bytes: int) -> Iterator[None]:
    """Let the process have so many bytes of data more than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[_DATA_PAGES]) * resource.getpagesize()
    wanted = held + limit_bytes
    if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (soft, hard)):
        yield  # it has less than that already
        return
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
