"""Loads of layers that follow each other: each reports once, when its own layers are all there."""

import threading
from types import SimpleNamespace
from typing import Any

from engines.failpoints import Failpoints
from engines.native import messages as m
from engines.native.layer_loading import LayerLoading
from engines.native.slices import Slices

SPEC = m.StageSpec(first_decoder=0, end_decoder=2, is_first=False, is_last=False, next_worker=-1)


class Layers:
    """Reads a layer once it may."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.may_read = threading.Semaphore(0)

    def read(self, layer: str, *, cancelled: threading.Event) -> Any:
        assert self.may_read.acquire(timeout=10.0)
        return SimpleNamespace(layer=layer, num_bytes=1, is_needed=not cancelled.is_set())

    def discard(self, read: Any) -> None:
        """Nobody needs it."""

    def attach(self, layer: str, _read: Any) -> None:
        self.held.add(layer)


class Worker:
    """Its part that loads; what it tells itself and the core waits until a test hands it on."""

    def __init__(self) -> None:
        self.layers, self.slices = Layers(), Slices(worker=0, report=self._report)
        self.reports: list[Any] = []
        self.told = threading.Semaphore(0)
        runner: Any = SimpleNamespace(warm_up=lambda _layer: None)
        layers: Any = self.layers
        self.loading = LayerLoading(
            layers,
            runner,
            self.slices,
            Failpoints(),
            worker=0,
            tell_itself=lambda _message: self.told.release(),
            report=self._report,
        )

    def _report(self, report: Any) -> None:
        self.reports.append(report)

    def begin(self) -> None:
        self.loading.begin(m.Prepare(handover=0, spec=SPEC))

    def hand_on(self) -> None:
        """Handle that all is read, and do what follows from it."""
        self.loading.attach(0)
        while self.slices.are_waiting:
            self.slices.run_one()

    @property
    def done(self) -> int:
        return sum(isinstance(each, m.Prepared) and each.done for each in self.reports)


def test_a_load_that_takes_the_place_of_another_is_done_when_its_own_layers_are_there() -> None:
    """As when workers are lost one after the other: that the first load is done is told after the second has begun."""
    worker = Worker()
    worker.begin()
    worker.layers.may_read.release(2)
    assert worker.told.acquire(timeout=10.0)
    worker.begin()
    worker.hand_on()  # of the first
    assert (worker.done, worker.layers.held) == (0, set())
    worker.layers.may_read.release(2)
    assert worker.told.acquire(timeout=10.0)
    worker.hand_on()
    assert (worker.done, worker.layers.held) == (1, {"0", "1"})
    worker.hand_on()
    assert not [each for each in worker.reports if isinstance(each, m.Failed)]
