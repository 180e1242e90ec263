"""Keeps parameters of layers in host memory, for all engines of the daemon, for as long as it lives.

It has no copy of them in its own heap: it holds descriptors of memory that stages have filled and map (converted
parameters), and pins the pieces of files that stages map as they are. ``planner.parameter_cache`` decides what stays.
"""

import asyncio
import os
import secrets
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol, assert_never

import msgspec

from engines.parameters import messages as p
from engines.parameters.figures import CacheFigures
from engines.parameters.pinned import NotPinned, PinnedRanges
from planner.parameter_cache import KeptLayer, KeptLayers, added, given_up, left, taken

_CREDENTIALS: Final = struct.Struct("3i")  # process, user, group


class _Memory(Protocol):
    """What is kept of one layer."""

    def close(self) -> None:
        """Let go of it. May block for milliseconds per 100 MB."""


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        os.close(self.number)


class _Pinning:
    """Pieces of files, from when they are to be pinned, which a thread does, until they are let go."""

    def __init__(self) -> None:
        self._pinned: PinnedRanges | None = None
        self._is_closed = False

    def pin(self, ranges: list[tuple[str, int, int]]) -> None:
        """Runs in a thread, before ``close`` does. Raises ``NotPinned``."""
        if not self._is_closed:
            self._pinned = PinnedRanges(ranges)

    def close(self) -> None:
        self._is_closed = True
        if self._pinned is not None:
            self._pinned.close()


class ParameterKeeper:
    """Used on one event loop. With a budget of 0 it keeps nothing, and nobody asks it.

    Args:
        on_refusal: Told why a layer is not kept, in words.
    """

    def __init__(self, budget_bytes: int, *, on_refusal: Callable[[str], object] = lambda _reason: None) -> None:
        self.budget_bytes = budget_bytes
        self._on_refusal = on_refusal
        self._kept = KeptLayers()
        self._memory: dict[str, _Memory] = {}
        self._users: dict[socket.socket, Counter[str]] = {}
        self._work: set[asyncio.Future[None]] = set()
        self._queue = asyncio.Lock()  # pinning and letting go, one after the other
        self._hits = self._misses = self._given_up = self._refused = 0
        self._refusal = ""
        self.address = f"flexpiped-parameters-{os.getpid()}-{secrets.token_hex(8)}" if budget_bytes else ""

    @property
    def kept(self) -> KeptLayers:
        """What is kept now."""
        return self._kept

    @property
    def figures(self) -> CacheFigures:
        idle = [each for each in self._kept.layers if not each.users]
        return CacheFigures(
            budget_bytes=self.budget_bytes,
            held_bytes=self._kept.held_bytes,
            idle_bytes=self._kept.idle_bytes,
            layers=len(self._kept.layers),
            idle_layers=len(idle),
            hits_total=self._hits,
            misses_total=self._misses,
            given_up_total=self._given_up,
            refused_total=self._refused,
            refusal=self._refusal,
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answer stages in this scope; at its end everything is let go."""
        if not self.address:
            yield
            return
        # A name that is in no directory: nothing is left of it, however the daemon ends.
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
            listener.bind(f"\0{self.address}")
            listener.listen(64)
            loop = asyncio.get_running_loop()
            loop.add_reader(listener.fileno(), self._accept, listener)
            try:
                yield
            finally:
                loop.remove_reader(listener.fileno())
                for connection in tuple(self._users):
                    self._hang_up(connection)
                self._let_go(tuple(self._memory))
                self._kept = KeptLayers()
                while self._work:
                    await asyncio.wait(tuple(self._work))

    async def give_up(self, num_bytes: int) -> int:
        """Give up idle layers of at least so many bytes, or all of them; return how many bytes that were."""
        before = self._kept.held_bytes
        self._kept, gone = given_up(self._kept, num_bytes=num_bytes)
        self._given_up += len(gone)
        letting_go = self._let_go(gone)
        if letting_go is not None:
            await asyncio.shield(letting_go)
        return before - self._kept.held_bytes

    # --- connections ---

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError):
            connection, _ = listener.accept()
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(raw)[1] != os.getuid():  # the name may be known to others on this host
                connection.close()
                return
            connection.setblocking(False)
            self._users[connection] = Counter()
            asyncio.get_running_loop().add_reader(connection.fileno(), self._read, connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            raw, descriptors, _, _ = socket.recv_fds(connection, p.MOST_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            raw, descriptors = b"", []
        try:
            if not raw:
                raise ConnectionResetError
            self._answer(connection, p.decode_question(raw), descriptors)
        except (OSError, msgspec.DecodeError):  # it has ended, speaks another language, or does not read
            self._hang_up(connection)
        finally:
            for each in descriptors:
                os.close(each)

    def _hang_up(self, connection: socket.socket) -> None:
        """A stage that has ended, however it did, has its layers no more."""
        for key, count in self._users.pop(connection).items():
            for _ in range(count):
                self._kept = left(self._kept, key)
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()

    def _answer(self, connection: socket.socket, question: p.Question, descriptors: list[int]) -> None:
        users = self._users[connection]
        match question:
            case p.Take():
                memory = self._memory.get(question.key)
                is_here = isinstance(memory, _Descriptor)
                self._count(is_hit=is_here)
                if is_here:
                    self._use(question.key, users)
                given = [memory.number] if isinstance(memory, _Descriptor) else []
                socket.send_fds(connection, [p.encode(p.Found(is_here=is_here))], given)
            case p.Keep():
                is_kept = bool(descriptors) and self._keep(question, descriptors[0])
                if is_kept:
                    users[question.key] += 1
                connection.send(p.encode(p.Noted(is_kept=is_kept)))
            case p.Hold():
                is_here = question.key in self._memory
                self._count(is_hit=is_here)
                if is_here:
                    self._use(question.key, users)
                elif is_here := self._hold(question):
                    users[question.key] += 1
                connection.send(p.encode(p.Noted(is_kept=is_here)))
            case p.Left():
                if users[question.key] > 0:
                    users[question.key] -= 1
                    self._kept = left(self._kept, question.key)
            case _:
                assert_never(question)

    def _count(self, *, is_hit: bool) -> None:
        self._hits += is_hit
        self._misses += not is_hit

    def _use(self, key: str, users: Counter[str]) -> None:
        users[key] += 1
        self._kept = taken(self._kept, key)

    # --- what is kept ---

    def _keep(self, question: p.Keep, descriptor: int) -> bool:
        """Keep memory that a stage has filled."""
        size = os.fstat(descriptor).st_size
        new = KeptLayer(key=question.key, name=question.name, of=question.of, num_bytes=size, users=1)
        if question.key in self._memory or not self._has_room_for(new):
            return False
        self._memory[question.key] = _Descriptor(os.dup(descriptor))
        return True

    def _hold(self, question: p.Hold) -> bool:
        size = sum(end - start for _, start, end in question.ranges)
        new = KeptLayer(key=question.key, name=question.name, of=question.of, num_bytes=size, users=1)
        if not self._has_room_for(new):
            return False
        pinning = _Pinning()
        self._memory[question.key] = pinning
        self._behind(self._pin(question, pinning))
        return True

    async def _pin(self, question: p.Hold, pinning: _Pinning) -> None:
        try:
            async with self._queue:
                await asyncio.to_thread(pinning.pin, question.ranges)
        except NotPinned as error:
            if self._memory.get(question.key) is pinning:
                del self._memory[question.key]
                self._kept = self._kept.without(question.key)
            self._refuse(question.name, str(error))

    def _has_room_for(self, new: KeptLayer) -> bool:
        found = added(self._kept, new, budget_bytes=self.budget_bytes)
        if found is None:
            self._refuse(new.name, "the budget is used up by layers in use (devices.parameter_cache)")
            return False
        self._kept, gone = found
        self._given_up += len(gone)
        self._let_go(gone)
        return True

    def _refuse(self, name: str, reason: str) -> None:
        self._refused += 1
        self._refusal = f"{name}: {reason}"
        self._on_refusal(self._refusal)

    def _let_go(self, keys: tuple[str, ...]) -> "asyncio.Future[None] | None":
        """Give memory back, in a thread: to free much of it takes the kernel a while."""
        memories = [self._memory.pop(key) for key in keys]
        return self._behind(self._close(memories)) if memories else None

    async def _close(self, memories: list[_Memory]) -> None:
        async with self._queue:
            for each in memories:
                await asyncio.to_thread(each.close)

    def _behind(self, work: Coroutine[None, None, None]) -> "asyncio.Future[None]":
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task
