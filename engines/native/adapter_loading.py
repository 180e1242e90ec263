"""A worker's part when a LoRA adapter comes or goes: it is read beside the steps, and put in between two of them."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engines.errors import UnsupportedByEngine
from engines.failpoints import FailpointHit, Failpoints
from engines.native import messages as m
from engines.native.family import Family
from engines.native.lora import Adapter, LoraModules
from engines.native.lora_files import AdapterFiles, read_adapter
from engines.process import trim_heap

_NICE: Final = 19  # steps come first


class AdapterLoading:
    """Used on the worker's main thread.

    Args:
        tell_itself: Puts a message into the worker's own inbox.
        report: Tells the core.
    """

    def __init__(
        self,
        lora: LoraModules,
        family: Family,
        failpoints: Failpoints,
        *,
        worker: int,
        tell_itself: Callable[[m.AdapterRead], None],
        report: Callable[[m.AdapterLoaded], None],
    ) -> None:
        self._lora = lora
        self._family = family
        self._failpoints = failpoints
        self._worker = worker
        self._tell_itself = tell_itself
        self._report = report
        self._read: dict[int, Adapter | str] = {}  # by number, what a thread has read, or why it could not

    def handle(self, message: m.LoadAdapter | m.AdapterRead | m.DropAdapter) -> None:
        """Do what the message says; a bounded piece of work, but for one that is read at once."""
        match message:
            case m.LoadAdapter(at_once=True):
                self._put_in(message.number, self._read_now(message))
            case m.LoadAdapter():
                threading.Thread(target=self._read_beside, args=(message,), daemon=True).start()
            case m.AdapterRead():
                self._put_in(message.number, self._read.pop(message.number))
            case m.DropAdapter():
                self._lora.drop(message.number)
                trim_heap()

    def _read_beside(self, message: m.LoadAdapter) -> None:
        """In a thread."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone
        self._read[message.number] = self._read_now(message)
        self._tell_itself(m.AdapterRead(number=message.number))

    def _read_now(self, message: m.LoadAdapter) -> Adapter | str:
        files = AdapterFiles(
            name=message.name,
            directory=message.directory,
            config=Path(message.config),
            weights=Path(message.weights),
        )
        try:
            self._failpoints.hit("worker.adapter")
            return read_adapter(files, self._family)
        except UnsupportedByEngine as refusal:
            return str(refusal)
        except (FailpointHit, RuntimeError, MemoryError) as error:
            return str(files.refusal(f"{type(error).__name__}: {error}"))

    def _put_in(self, number: int, read: Adapter | str) -> None:
        if isinstance(read, Adapter):
            self._lora.add(number, read)
        refusal, num_bytes = ("", read.num_bytes) if isinstance(read, Adapter) else (read, 0)
        self._report(m.AdapterLoaded(worker=self._worker, number=number, refusal=refusal, num_bytes=num_bytes))
