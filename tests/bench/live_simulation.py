"""The live comparison in the simulator: layouts deeper than this machine has cores for, fixed and with auto."""

from dataclasses import replace
from math import inf
from typing import Final

import msgspec

from engines.native.options import NativeOptions
from planner.model_graph import ModelGraph
from planner.policy_state import PolicyConstants
from planner.prediction import PipelineTimes
from planner.profile import Profile
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.pool import DevicePool, PoolDevice
from planner.simulation.run import Setting, simulate
from planner.simulation.shape import Shape
from planner.simulation.step_times import StepTimes
from planner.traces import Trace, workload_of
from tests.bench.live_figures import LENGTHS, OneStage, Served, devices_over_time, fixed_name, length_s
from tests.bench.program import even
from tests.bench.simulator_fidelity import simulated, times_of

DURATIONS: Final = (
    *("cv_window_s", "confirm_s", "dwell_s", "cool_down_s"),
    *("expected_dwell_s", "guard_s", "bar_s", "add_again_s", "reclaim_s"),
)
_PREPARE_S, _PAUSE_S = 0.25, 0.003  # of a change: the README's figures


def paced(pace: float) -> PolicyConstants:
    """Return the policy's defaults, ``pace`` times as fast."""
    usual = PolicyConstants()
    return replace(usual, **{name: getattr(usual, name) / pace for name in DURATIONS})


class LiveSimulation:
    """What the profile says of the same requests. What a step takes beside its stages is as with one stage."""

    def __init__(self, options: NativeOptions, graph: ModelGraph, profile: Profile, alone: OneStage) -> None:
        self._options = options
        self._graph = graph
        self._profile = profile
        self._alone = alone
        context = LENGTHS.prompt_tokens_mean + LENGTHS.output_tokens_mean / 2
        single = StepTimes(self._times(1, overhead_s=0.0)).decode(1, context, beside=False).passing_s
        self._overhead_s = max(0.0, alone.tpot_s - single)

    def fixed(self, trace: Trace, *, stages: int) -> Served:
        """Simulate a fixed layout on as many cores, with the KV cache that so many devices have."""
        found, _ = simulated(self._times(stages, overhead_s=self._overhead_s), trace)
        return Served(name=f"{fixed_name(stages)}, simulated", times=found, device_s=stages * length_s(found))

    def adapting(self, trace: Trace, *, most: int, pace: float) -> Served:
        """Simulate auto with layouts of 1, 2, 4 .. stages up to ``most``, on as many devices."""
        counts = [count for count in (1, 2, 4, 8, 16) if count <= most]
        shapes = {count: self._shape(count) for count in counts}
        expected, constants = replace(workload_of(trace), cv=1.0), paced(pace)
        system = Flexpiped(constants=constants, outlooks=Outlooks(shapes, self._alone.slo), expected=expected)
        devices = [PoolDevice(index=index, host="here", total_bytes=1 << 40) for index in range(most)]
        outcome = simulate(
            Setting(
                trace=trace,
                shapes=shapes,
                slo=self._alone.slo,
                expected=expected,
                interval_s=5 / pace,
                windows_s=(30 / pace, constants.cv_window_s),
            ),
            DevicePool(devices=devices),
            system,
        )
        changes = [each for each in system.decisions if each.action is not None]
        marks = [{"after_s": each.at_s, "message": each.reason} for each in changes]
        begins_with = next(iter(outcome.samples[0].replicas), 1)
        return Served(
            name=f"auto up to {most}, simulated",
            times=outcome.requests,
            decisions=marks,
            device_s=devices_over_time(marks, begins_with=begins_with, until_s=length_s(outcome.requests)),
        )

    def _shape(self, stages: int) -> Shape:
        return Shape(
            num_stages=stages,
            times=self._times(stages, overhead_s=self._overhead_s),
            stage_weight_bytes=1,
            stage_kv_bytes_per_token=0.0,  # the KV cache is what the times say, and memory of the devices does not bind
            min_kv_tokens=1,
            cold_s=inf,
            warm_s=inf,
            prepare_s=_PREPARE_S,
            pause_s=_PAUSE_S,
        )

    def _times(self, stages: int, *, overhead_s: float) -> PipelineTimes:
        options = msgspec.structs.replace(self._options, threads=stages)
        times = times_of(options, self._graph, self._profile, even(stages))
        return replace(times, step_overhead_s=overhead_s)
