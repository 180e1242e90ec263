"""The core's side of its stage workers: fork, watch, restart, and pass their reports on."""

import asyncio
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace

from engines.native import messages as m
from engines.native.context import WorkerContext
from engines.native.worker_process import worker_main


class WorkerPool:
    """One resident worker process per device, by index."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._on_report: Callable[[m.WorkerReport], None] = lambda _report: None
        self._core_pid = os.getpid()
        self._pids: list[int] = [0] * len(context.inboxes)
        self._pidfds: list[int] = [-1] * len(context.inboxes)
        self._on_death: Callable[[int, str], None] = lambda _index, _reason: None
        self._close_in_child: list[int] = []
        self._kept: set[int] = set()
        self.restarts = 0

    @property
    def size(self) -> int:
        return len(self._pids)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(self._pids)

    def spawn(self, index: int) -> None:
        """Fork the worker ``index``. The core runs a single thread and has started no torch thread."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for descriptor in (*self._close_in_child, *self._kept):
                    os.close(descriptor)
                status = worker_main(index, self._context, core_pid=self._core_pid)
            finally:
                if sys.exc_info()[0] is not None:  # a bug: the core learns the status, the log the place
                    traceback.print_exc()
                os._exit(status)
        self._pids[index] = pid
        self._pidfds[index] = os.pidfd_open(pid)

    def watch(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_report: Callable[[m.WorkerReport], None],
        on_death: Callable[[int, str], None],
        private: list[int],
    ) -> None:
        """Read reports and watch for deaths from now on. ``private`` descriptors are closed in workers forked later."""
        self._on_report = on_report
        self._on_death = on_death
        self._close_in_child = private
        loop.add_reader(self._context.core_inbox.fileno(), self._read_reports)
        for index, pidfd in enumerate(self._pidfds):
            loop.add_reader(pidfd, self._ended, index)

    def keep_to_itself(self, descriptors: Iterable[int]) -> None:
        """Have workers forked from now on close these: what they refer to goes when the core closes it."""
        self._kept.update(descriptors)

    def forget(self, descriptors: Iterable[int]) -> None:
        """The core is about to close these. Idempotent."""
        self._kept.difference_update(descriptors)

    def send(self, index: int, command: m.WorkerCommand) -> None:
        self._context.inboxes[index].send(m.encode(command))

    def send_raw(self, index: int, raw: bytes) -> None:
        """Send a command encoded already, as when several workers get the same."""
        self._context.inboxes[index].send(raw)

    def send_all(self, command: m.WorkerCommand) -> None:
        raw = m.encode(command)
        for inbox in self._context.inboxes:
            inbox.send(raw)

    def keep_at(self, address: str) -> None:
        """Have all workers, and those forked later, turn to another keeper of parameters."""
        self._context = replace(self._context, parameters=address)
        self.send_all(m.KeepAt(address=address))

    def kill(self, index: int) -> None:
        """Kill a worker that hangs; its death is then noticed as any other."""
        os.kill(self._pids[index], signal.SIGKILL)

    def restart(self, index: int) -> None:
        """Fork a new process for a worker that has ended; what its inbox held is stale."""
        self._context.inboxes[index].discard_all()
        self.spawn(index)
        asyncio.get_running_loop().add_reader(self._pidfds[index], self._ended, index)
        self.restarts += 1

    def end(self) -> None:
        """Have every worker exit, and kill those that do not within a second."""
        self.send_all(m.Exit())
        for pid in self._pids:
            deadline = 100
            while deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
                signal.sigtimedwait([signal.SIGCHLD], 0.01)
                deadline -= 1
            if not deadline:
                os.kill(pid, signal.SIGKILL)

    def _read_reports(self) -> None:
        inbox = self._context.core_inbox
        for _ in range(32):  # then let others have a turn
            raw = inbox.receive_now()
            if raw is None:
                return
            self._on_report(m.decode_report(raw))

    def _ended(self, index: int) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfds[index])
        os.close(self._pidfds[index])
        _, status = os.waitpid(self._pids[index], 0)
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        self._read_reports()  # its last words, if any, come before its end
        self._on_death(index, f"worker {index} (pid {self._pids[index]}) {how}")
