"""After the loss of a worker its stage is loaded again, some times; then the engine ends."""

import asyncio
from dataclasses import dataclass, field

from engines.native import messages as m
from engines.native.recovery import Recovery
from engines.native.stage_loading import StageLoading

SPEC = m.StageSpec(first_decoder=0, end_decoder=4, is_first=True, is_last=True, next_worker=-1)


@dataclass(slots=True)
class Stand:
    """One worker, which is lost as often as a test says."""

    sent: list[int] = field(default_factory=list)
    happened: list[str] = field(default_factory=list)
    loading: StageLoading = field(init=False)
    recovery: Recovery = field(init=False)

    def __post_init__(self) -> None:
        self.loading = StageLoading(self._sent)
        self.recovery = Recovery(
            self.loading,
            specs=lambda: {0: SPEC},
            on_loaded=lambda: self.happened.append("loaded"),
            fail=self.happened.append,
        )

    def _sent(self, index: int, command: m.WorkerCommand) -> None:
        assert command == m.Prepare(handover=0, spec=SPEC)
        self.sent.append(index)


async def test_the_stage_is_loaded_and_the_engine_goes_on() -> None:
    stand = Stand()
    stand.recovery.begin()
    await asyncio.sleep(1)
    assert (stand.sent, stand.happened, stand.recovery.is_under_way) == ([0], [], True)

    stand.loading.on_report(m.Prepared(worker=0, handover=0, weights_bytes=1, done=True))
    await asyncio.sleep(1)
    assert (stand.happened, stand.recovery.is_under_way) == (["loaded"], False)


async def test_three_loads_are_tried() -> None:
    stand = Stand()
    stand.recovery.begin()
    for _attempt in range(3):
        await asyncio.sleep(1)
        stand.loading.failed(0, "no such file")
    await asyncio.sleep(1)

    assert stand.sent == [0, 0, 0]
    assert stand.happened == ["a stage cannot be loaded again: no such file"]
    assert stand.recovery.is_under_way  # nothing is scheduled any more


async def test_a_further_loss_begins_it_anew() -> None:
    stand = Stand()
    stand.recovery.begin()
    await asyncio.sleep(1)
    stand.recovery.begin()
    await asyncio.sleep(1)

    stand.loading.on_report(m.Prepared(worker=0, handover=0, weights_bytes=1, done=True))
    await asyncio.sleep(1)
    assert (stand.sent, stand.happened) == ([0, 0], ["loaded"])
