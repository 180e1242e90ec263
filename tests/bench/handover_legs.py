"""One leg of the handover benchmark: streams, an undisturbed window, a move, another undisturbed window."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engines.protocol import RefactorProgress
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from tests.bench.rigs import Rig

Window = tuple[float, float]
_PHASES = (
    HandoverPhase.PREPARING,
    HandoverPhase.SYNCING,
    HandoverPhase.COMMITTING,
    HandoverPhase.RETIRING,
    HandoverPhase.DONE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """What was seen. ``control`` has the undisturbed windows, by number of stages."""

    before: int
    after: int
    step_ends_s: list[float]
    times_s: list[list[float]]
    move: Window
    control: tuple[tuple[int, Window], tuple[int, Window]]
    reports: list[RefactorProgress]

    @property
    def move_s(self) -> float:
        return self.move[1] - self.move[0]

    def to_wire(self) -> dict[str, Any]:
        """Return what the engine reported, as JSON values."""
        last = self.reports[-1]
        return {
            "before": self.before,
            "after": self.after,
            "move_s": self.move_s,
            "phases_s": phase_durations(self.reports),
            "commit_pause_s": last.commit_pause_s,
            "drain_s": last.drain_s,
            "kv_round_bytes": list(last.kv_round_bytes),
            "kv_bytes": last.kv_bytes,
            "weights_bytes": last.weights_bytes,
            "returned_bytes": last.returned_bytes,
            "requests_live": last.requests_live,
        }


async def run_leg(
    rig: Rig, *, current: Pipeline, target: Pipeline, streams: int, prompt_tokens: int, window_s: float
) -> Leg:
    """Measure one move. The streams begin anew for each leg, so that contexts are of like length in all legs."""
    await rig.begin(streams, prompt_tokens)
    began_s = time.monotonic()
    await asyncio.sleep(window_s)
    move_began_s = time.monotonic()
    reports = await rig.move(target)
    move_ended_s = time.monotonic()
    await asyncio.sleep(window_s)
    ended_s = time.monotonic()
    leg = Leg(
        before=current.granularity,
        after=target.granularity,
        step_ends_s=await rig.step_ends(),
        times_s=await rig.times(),
        move=(move_began_s, move_ended_s),
        control=(
            (current.granularity, (began_s, move_began_s)),
            (target.granularity, (move_ended_s, ended_s)),
        ),
        reports=reports,
    )
    await rig.end()
    return leg


def phase_durations(reports: Sequence[RefactorProgress]) -> dict[str, float]:
    """Return how long each phase took, by the engine's clock."""
    began: dict[HandoverPhase, float] = {}
    for report in reports:
        began.setdefault(report.phase, report.elapsed_s)
    seen = [phase for phase in _PHASES if phase in began]
    return {phase.value: began[following] - began[phase] for phase, following in pairwise(seen)}
