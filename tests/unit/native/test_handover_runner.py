"""The handover of the native engine, without processes."""

from itertools import count
from types import SimpleNamespace
from typing import Any

from engines.failpoints import Failpoints
from engines.native import messages as m
from engines.native.handover import HandoverRunner
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.support.graphs import graph_of
from tests.support.native import even, options_for


class Core:
    """What a handover needs of the engine core; workers free what they are told to, and nothing is loaded."""

    def __init__(self, *, tmp_path: Any) -> None:
        self.boot = SimpleNamespace(options=options_for(tmp_path), graph=graph_of())
        self.pipeline = even(1)
        self.worker_of = {device: index for index, device in enumerate(self.boot.options.device_ids)}
        self.failpoints = Failpoints()
        self.scheduler = SimpleNamespace(num_live=0, num_running=0)
        self.pool = self
        self.recovering = False
        self.sent: list[m.WorkerCommand] = []
        self.take_ticket = count(1).__next__
        self.runner = HandoverRunner(self, even(4), on_progress=lambda _: None)  # type: ignore[arg-type]

    def send(self, index: int, command: m.WorkerCommand) -> None:
        self.sent.append(command)
        if isinstance(command, m.Release):
            self.runner.on_report(m.Released(worker=index, handover=command.handover, weights_bytes=0, kv_bytes=0))

    async def make_way(self, _target: Pipeline) -> None:
        """Meanwhile a worker is lost, as it may be at any time."""
        self.recovering = True


async def test_nothing_is_prepared_while_a_lost_worker_is_recovered(tmp_path: Any) -> None:
    """A worker that loads for the recovery would load for the handover instead, and the recovery never end."""
    core = Core(tmp_path=tmp_path)
    result = await core.runner.run()
    assert (result.state.phase, result.state.reason) == (HandoverPhase.ABORTED, "a lost worker is being recovered")
    assert not [each for each in core.sent if isinstance(each, m.Prepare)]
