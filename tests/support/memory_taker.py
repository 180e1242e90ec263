"""Another tenant of the host: ``python -m tests.support.memory_taker BYTES`` takes memory until so much is available.

It holds that, taking more or giving some back as others do, 2 GiB at most, and ends, memory and all, with its input.
"""

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import Final

from topology.host_memory import free_host_memory

_STEP_BYTES: Final = 16 << 20
_MOST_STEPS: Final = 128


@contextmanager
def taking_all_but(free_bytes: int) -> Iterator[None]:
    """Have a process take memory until so much is available on this host, as long as the scope lasts."""
    with Popen([sys.executable, "-m", "tests.support.memory_taker", str(free_bytes)], stdin=PIPE) as process:
        yield
        assert process.poll() is None, "it should have held its memory until now"


def _available_bytes() -> int:
    found = free_host_memory()
    assert found is not None
    return found.free_bytes


def _take(free_bytes: int) -> None:
    held: list[bytes] = []
    while not select.select([sys.stdin], [], [], 0.0)[0]:
        left = _available_bytes() - free_bytes
        if left > _STEP_BYTES and len(held) < _MOST_STEPS:
            held.append(b"\1" * _STEP_BYTES)
        elif left < -_STEP_BYTES and held:
            held.pop()
        else:
            select.select([sys.stdin], [], [], 0.05)


if __name__ == "__main__":
    _take(int(sys.argv[1]))
