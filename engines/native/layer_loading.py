"""A worker's part in the prepare of a handover: layers are read in a thread, and attached slice by slice.

The thread spends its time inside the kernel: it maps the weights and faults them in.
"""

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

from engines.failpoints import FailpointHit, Failpoints
from engines.native import messages as m
from engines.native.layer_source import ReadLayer
from engines.native.slices import Slices
from engines.native.stage import HeldLayers, StageRunner

_NICE: Final = 19  # steps come first


class _Job:
    """Layers on their way in, for a handover or (number 0) for a start or a recovery."""

    def __init__(self, *, handover: int, spec: m.StageSpec, missing: list[str]) -> None:
        self.handover = handover
        self.spec = spec
        self.missing = missing
        self.read: dict[str, ReadLayer] = {}  # filled by the thread
        self.is_read = False  # the thread is done, and nothing is attached yet
        self.cancelled = threading.Event()
        self._changing = threading.Lock()

    def take_in(self, layer: str, read: ReadLayer) -> bool:
        """Keep what was read; False: it is not wanted any more."""
        with self._changing:
            if not self.cancelled.is_set():
                self.read[layer] = read
            return not self.cancelled.is_set()

    def cancel(self) -> list[ReadLayer]:
        """Have the thread stop; return what was read and nobody will attach."""
        with self._changing:
            self.cancelled.set()
            read, self.read = self.read, {}
            return list(read.values())


class LayerLoading:
    """Used on the worker's main thread. One load at a time: another one takes its place.

    Args:
        tell_itself: Puts a message into the worker's own inbox.
        report: Tells the core.
    """

    def __init__(
        self,
        layers: HeldLayers,
        runner: StageRunner,
        slices: Slices,
        failpoints: Failpoints,
        *,
        worker: int,
        tell_itself: Callable[[m.Loaded], None],
        report: Callable[[m.Prepared | m.Failed], None],
    ) -> None:
        self._layers = layers
        self._runner = runner
        self._slices = slices
        self._failpoints = failpoints
        self._worker = worker
        self._tell_itself = tell_itself
        self._report = report
        self._job: _Job | None = None

    @property
    def spec(self) -> m.StageSpec | None:
        """The role that is loaded for, until it is cancelled."""
        return None if self._job is None else self._job.spec

    def is_for(self, handover: int) -> bool:
        """Whether it is this handover's role that is loaded for."""
        return self._job is not None and self._job.handover == handover

    def begin(self, message: m.Prepare) -> None:
        """Begin to load what the future role needs and this worker lacks; the thread reports to this inbox."""
        if self._job is not None:
            self._cancel(self._job)
        missing = [layer for layer in message.spec.layers() if layer not in self._layers.held]
        self._job = _Job(handover=message.handover, spec=message.spec, missing=missing)
        threading.Thread(target=self._load, args=(self._job,), daemon=True).start()

    def attach(self, handover: int) -> None:
        """All is read: put it in, slice by slice, and report then."""
        job = self._job
        if job is None or job.handover != handover or not job.is_read:  # what is read is another load's of that number
            return
        job.is_read = False
        for layer in job.read:
            self._slices.add(handover, (partial(self._attach, job, layer), partial(self._runner.warm_up, layer)))
        self._slices.add(handover, (partial(self._report_prepared, handover, -1, done=True),))

    def cancel(self, handover: int) -> None:
        """Let go of what was loaded for this handover and is not attached."""
        if self._job is not None and self._job.handover == handover:
            self._cancel(self._job)

    def _load(self, job: _Job) -> None:
        """In a thread: map the weights and fault them in. Hardly any Python runs here."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)  # of this thread alone
        done_bytes = 0
        try:
            self._failpoints.hit("worker.load")
            for layer in job.missing:
                read = self._layers.read(layer, cancelled=job.cancelled)
                done_bytes += read.num_bytes
                if not job.take_in(layer, read):
                    self._layers.discard(read)
                    return
                self._report_prepared(job.handover, done_bytes, done=False)
        except (FailpointHit, OSError, KeyError, ValueError, RuntimeError) as error:
            self._report(m.Failed(worker=self._worker, handover=job.handover, reason=f"loading failed: {error}"))
            return
        job.is_read = True
        self._tell_itself(m.Loaded(handover=job.handover))

    def _cancel(self, job: _Job) -> None:
        for read in job.cancel():
            self._layers.discard(read)
        self._slices.forget(job.handover)
        self._job = None

    def _attach(self, job: _Job, layer: str) -> None:
        self._layers.attach(layer, job.read.pop(layer))  # else whoever drops it would not have let go of it

    def _report_prepared(self, handover: int, weights_bytes: int, *, done: bool) -> None:
        if done:
            self._failpoints.hit("worker.prepared")
        self._report(m.Prepared(worker=self._worker, handover=handover, weights_bytes=weights_bytes, done=done))
