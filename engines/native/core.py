"""The engine core process: ``python -m engines.native.core FD PARENT [LISTENER]``.

FD is a connected stream socket to the daemon, PARENT its process, with which the core dies. With a LISTENER, a bound
socket, it may outlive the daemon (``Outlive``): requests are forgotten, weights and layout stay, and the next daemon
connects there.

It imports torch and transformers, builds the model's skeleton, forks the stage workers, and only then starts its event
loop. It runs no tensor operation itself, so it never has a torch thread and may fork again when a worker is lost.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import assert_never

import uvloop

from engines.errors import EngineError, UnsupportedByEngine
from engines.failpoints import FailAction
from engines.frames import read_frame, receive_frame, send_frame, write_frame
from engines.native import client_messages as c
from engines.native import messages as m
from engines.native.boot import Boot, boot
from engines.native.engine_core import EngineCore
from engines.native.grammar_setup import grammars_for
from engines.native.refactoring import check, refactor
from engines.native.stage_loading import StageNotLoaded
from engines.native.stage_reports import stages_of, steps_of
from engines.native.workers import WorkerPool
from engines.process import die_with_parent
from engines.protocol import RefactorProgress
from engines.reception import Reception
from planner.errors import PlannerError


class CoreServer:
    """Speaks with the daemon on behalf of one ``EngineCore``."""

    def __init__(self, booted: Boot, pool: WorkerPool, *, reception: Reception | None, private: list[int]) -> None:
        self._boot = booted
        self._pool = pool
        self._reception = reception
        self._private = private
        self._reader = asyncio.StreamReader()
        self._writer: asyncio.StreamWriter | None = None  # None while there is no daemon
        self._core = EngineCore(booted, pool, emit=self._emit)
        self._tasks: set[asyncio.Task[None]] = set()
        self._adopt_within_s: float | None = None  # None: it ends with its daemon

    async def connect(self, connection: socket.socket) -> None:
        """Speak with the daemon at the other end from here on."""
        self._private[:] = [connection.fileno(), *([] if self._reception is None else [self._reception.fileno()])]
        self._reader, self._writer = await asyncio.open_connection(sock=connection)

    async def serve(self) -> None:
        """Load the first layout, then obey until told to shut down, or until no daemon is there or comes."""
        self._emit(c.Starting(message="loading weights"))
        starting = asyncio.ensure_future(self._core.start())
        await asyncio.sleep(0)  # the workers are told to read them
        self._read_grammars()
        try:
            await starting
        except StageNotLoaded as error:
            self._emit(c.StartFailed(reason=str(error), unsupported=False))
            return
        self._emit(self._ready())
        watching = asyncio.ensure_future(self._core.watch_for_hangs())
        watching.add_done_callback(self._ended)
        commands = asyncio.create_task(self._obey_daemons())
        await asyncio.wait((commands, self._core.failed), return_when=asyncio.FIRST_COMPLETED)
        if self._core.failed.done():
            self._emit(c.Fatal(reason=self._core.failed.result()))
        else:
            await commands
        if self._reception is not None:
            self._reception.close()

    def _ready(self) -> c.Ready:
        boot_ = self._boot
        return c.Ready(
            max_model_len=boot_.limits.max_model_len,
            vocab_size=boot_.vocab_size,
            eos_token_ids=boot_.eos_token_ids,
            worker_pids=self._pool.pids,
            attention=boot_.attention,
            kv_range=self._core.kv.range,
            grammars=self._core.matchers.grammars is not None,
        )

    async def flush(self) -> None:
        """Return when the daemon has been told everything, or is gone."""
        if self._writer is not None:
            with suppress(ConnectionError):
                await self._writer.drain()

    def _read_grammars(self) -> None:
        """Make ready for constrained output: while the workers are busy, since nothing else runs here meanwhile."""
        boot_ = self._boot
        self._core.matchers.grammars, reason = grammars_for(
            Path(boot_.context.checkpoint.directory), vocab_size=boot_.vocab_size, eos_token_ids=boot_.eos_token_ids
        )
        if reason:
            self._emit(c.Starting(message=f"no constrained output: {reason}"))

    async def _obey_daemons(self) -> None:
        """Obey one daemon after the other, until one says that it is over, or none comes."""
        while not await self._obey() and self._adopt_within_s is not None and self._reception is not None:
            await self._let_go_of_daemon()
            connection = await self._reception.next_daemon(within_s=self._adopt_within_s)
            if connection is None:
                return
            await self.connect(connection)

    async def _obey(self) -> bool:
        """Obey this daemon. Return True when it has said that it is over, False when it is gone."""
        while (raw := await read_frame(self._reader)) is not None:
            command = c.decode_command(raw)
            if isinstance(command, c.Shutdown):
                return True
            self._perform(command)
        return False

    async def _let_go_of_daemon(self) -> None:
        """Nobody wants what is under way: a handover is rolled back, or past its commit finished; requests are freed.

        Answers to this daemon must not get to the next one, so everything that may still answer ends first.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        if self._core.handover is not None:
            self._core.handover.cancel()
        self._core.abort_all()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._core.until_idle()

    def _perform(self, command: c.ClientCommand) -> None:
        core = self._core
        match command:
            case c.Submit():
                core.submit(command)
            case c.Abort():
                core.abort(command.key)
            case c.Refactor():
                self._spawn(self._refactor(command))
            case c.ResizeKv():
                self._spawn(self._resize_kv(command))
            case c.LoadAdapter() | c.UnloadAdapter():
                self._spawn(self._change_adapters(command))
            case c.CheckRefactor():
                self._emit(c.Checked(call=command.call, check=check(core, command.target)))
            case c.CancelRefactor():
                accepted = core.handover is not None and core.handover.cancel()
                self._emit(c.Cancelled(call=command.call, accepted=accepted))
            case c.ReadCounters():
                self._emit(c.Counters(call=command.call, counters=core.counters()))
            case c.ReadStages():
                self._spawn(self._tell_stages(command.call))
            case c.ReadTrace():
                ends, epochs, dispatches = core.trace.take()
                self._emit(c.Trace(call=command.call, ends_s=ends, epochs=epochs, dispatches_s=dispatches))
            case c.ReadSteps():
                self._spawn(self._tell_steps(command.call))
            case c.ArmCore():
                self._arm(command)
            case c.Outlive():
                self._adopt_within_s = command.adopt_within_s
            case c.AdoptCore():
                core.pool.keep_at(command.parameters)
                core.adapters.adopted()
                self._emit(
                    c.Adopted(
                        ready=self._ready(),
                        pipeline=core.pipeline,
                        epoch=core.epoch,
                        options=self._boot.options,
                        adapters=dict(core.adapters.directories),
                        adapter_bytes=core.adapters.bytes_that_stay,
                    )
                )
            case c.StartCore() | c.Shutdown():
                raise AssertionError("not expected here")
            case _:
                assert_never(command)

    async def _refactor(self, command: c.Refactor) -> None:
        def tell(progress: RefactorProgress) -> None:
            self._emit(c.Progress(call=command.call, progress=progress))

        error, message = "", ""
        try:
            await refactor(self._core, command.target, on_progress=tell)
        except EngineError as refusal:
            error, message = type(refusal).__name__, str(refusal)
        self._emit(c.Refactored(call=command.call, error=error, message=message))

    async def _resize_kv(self, command: c.ResizeKv) -> None:
        returned_bytes, error, message = 0, "", ""
        try:
            returned_bytes = await self._core.resize_kv(command.blocks)
        except EngineError as refusal:
            error, message = type(refusal).__name__, str(refusal)
        self._emit(c.KvResized(call=command.call, error=error, message=message, returned_bytes=returned_bytes))

    async def _change_adapters(self, command: c.LoadAdapter | c.UnloadAdapter) -> None:
        adapters, error, message = self._core.adapters, "", ""
        try:
            if isinstance(command, c.LoadAdapter):
                await adapters.load(command.name, command.directory)
            else:
                adapters.unload(command.name, when_adopted=command.when_adopted)
        except EngineError as refusal:
            error, message = type(refusal).__name__, str(refusal)
        self._emit(
            c.AdapterChanged(
                call=command.call,
                error=error,
                message=message,
                adapters=dict(adapters.directories),
                adapter_bytes=adapters.bytes_that_stay,
            )
        )

    async def _tell_stages(self, call: int) -> None:
        self._emit(await stages_of(self._core, call=call))

    async def _tell_steps(self, call: int) -> None:
        self._emit(await steps_of(self._core, call=call))

    def _arm(self, command: c.ArmCore) -> None:
        if command.worker >= 0:
            self._pool.send(command.worker, m.ArmFailpoint(name=command.name, action=command.action))
        elif command.name:
            self._core.failpoints.arm(command.name, FailAction(command.action))
        else:
            self._core.failpoints.disarm()
            self._pool.send_all(m.ArmFailpoint(name="", action=""))

    def _emit(self, report: c.CoreReport) -> None:
        if self._writer is not None and not self._writer.is_closing():  # a daemon that was killed is noticed later
            write_frame(self._writer, c.encode(report))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._core.fail(f"{type(error).__name__}: {error}")

    @property
    def core(self) -> EngineCore:
        return self._core


async def _run(booted: Boot, pool: WorkerPool, connection: socket.socket, reception: Reception | None) -> None:
    private: list[int] = []
    server = CoreServer(booted, pool, reception=reception, private=private)
    await server.connect(connection)
    pool.watch(
        asyncio.get_running_loop(),
        on_report=server.core.on_report,
        on_death=server.core.on_worker_death,
        private=private,
    )
    await server.serve()
    await server.flush()


def _keep_apart(parent_pid: int, *, may_outlive: bool) -> None:
    """See to it that this process ends with its daemon, or else that nothing which ends the daemon reaches it."""
    if not may_outlive:
        die_with_parent(parent_pid=parent_pid)
    if os.getsid(0) != os.getpid():  # else whoever has started it has seen to that
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Run the core until it is told to end, or has no daemon any more."""
    listeners = [socket.socket(fileno=int(number)) for number in sys.argv[3:]]
    _keep_apart(int(sys.argv[2]), may_outlive=bool(listeners))
    reception = Reception(listeners[0]) if listeners else None
    connection = socket.socket(fileno=int(sys.argv[1]))
    first = c.decode_command(receive_frame(connection))
    assert isinstance(first, c.StartCore)
    send_frame(connection, c.encode(c.Starting(message="reading the model's description")))
    try:
        booted = boot(first.options, first.pipeline, epoch=first.epoch)
    except (UnsupportedByEngine, PlannerError) as error:
        send_frame(connection, c.encode(c.StartFailed(reason=str(error), unsupported=True)))
        return
    gc.collect()
    gc.freeze()  # what the workers inherit stays shared: the collector does not touch it
    pool = WorkerPool(booted.context)
    for index in range(pool.size):
        pool.spawn(index)
    uvloop.run(_run(booted, pool, connection, reception))
    pool.end()
    os._exit(0)


if __name__ == "__main__":
    main()
