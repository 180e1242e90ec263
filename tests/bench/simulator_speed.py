"""How long the simulator takes: two hours at 20 requests/s on 82 GPUs, and as much for each GPU on 1,000.

OPT-66B from FlexPipe's table on fragmented GPUs, with flexpiped's own policy; arrivals of CV 4. CPU time of the one
thread, which other work on the machine lengthens less than the time on the clock.

python -m tests.bench.simulator_speed
"""

import resource
import time
from dataclasses import dataclass
from typing import Final

from planner.policy_state import PolicyConstants
from planner.simulation import opt_66b
from planner.simulation.cluster import FLEXPIPE_OCCUPANCY, hosts_of, occupied_devices
from planner.simulation.outcome import Outcome
from planner.simulation.outlooks import Outlooks
from planner.simulation.own_policy import Flexpiped
from planner.simulation.pool import DevicePool
from planner.simulation.run import Setting, simulate
from planner.traces import drawn_trace
from planner.workload import Slo, Workload
from tests.bench.paper_systems import MOST_REPLICAS
from tests.bench.program import parser, run, whole_numbers
from tests.bench.tables import Bound, say, table, verdicts, write_json

_GPUS, _RATE_PER_S = 82, 20.0
_LIMITS_S: Final = {82: 60.0, 1000: 600.0}
_SLO: Final = Slo(ttft_s=5.0, tpot_s=0.4)
_SHARES: Final = (0.1, 0.2, 0.3, 0.5)
_TOLD_EVERY_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one simulation took: CPU of the thread and on the clock, and the most memory of the process so far."""

    outcome: Outcome
    cpu_s: float
    wall_s: float
    memory_bytes: int


class _Telling:
    """Says every twenty seconds how far a simulation is: one of 1,000 GPUs takes minutes."""

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._told_s = time.monotonic()

    def hear(self, now_s: float, end_s: float) -> None:
        if time.monotonic() - self._told_s > _TOLD_EVERY_S:
            self._told_s = time.monotonic()
            say(f"{self._gpus} GPUs: {now_s / 60:.0f} of {end_s / 60:.0f} minutes simulated")


def timed(*, gpus: int, hours: float) -> Speed:
    """Return how long a simulation takes; drawing its arrivals does not count."""
    share = gpus / _GPUS
    asked = Workload(
        rate_per_s=_RATE_PER_S * share,
        cv=4.0,
        prompt_tokens_mean=900,
        prompt_tokens_cv=0.8,
        output_tokens_mean=155,
        output_tokens_cv=0.6,
    )
    trace = drawn_trace(asked, duration_s=hours * 3600, seed=1)
    hosts = hosts_of(devices=gpus, hosts=max(1, gpus // 2))
    devices = occupied_devices(
        hosts, total_bytes=opt_66b.DEVICE_BYTES, shares=_SHARES, occupancy=FLEXPIPE_OCCUPANCY, seed=1
    )
    shapes = opt_66b.shapes()
    system = Flexpiped(
        constants=PolicyConstants(max_replicas=round(MOST_REPLICAS * max(1.0, share))),
        outlooks=Outlooks(shapes, _SLO),
        expected=asked,
    )
    telling = _Telling(gpus)
    began_s, cpu_s = time.monotonic(), time.thread_time()
    outcome = simulate(
        Setting(trace=trace, shapes=shapes, slo=_SLO, expected=asked),
        DevicePool(devices=devices),
        system,
        on_progress=telling.hear,
    )
    return Speed(
        outcome=outcome,
        cpu_s=time.thread_time() - cpu_s,
        wall_s=time.monotonic() - began_s,
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


async def main() -> int:
    made = parser("Time the simulator on one core.")
    made.add_argument("--gpus", type=whole_numbers, default=tuple(_LIMITS_S), help="sizes of the cluster")
    made.add_argument("--hours", type=float, default=2.0)
    arguments = made.parse_args()
    hours = 0.05 if arguments.short else arguments.hours
    rows, bounds = [], list[Bound]()
    for gpus in arguments.gpus:
        say(f"{gpus} GPUs")
        found = timed(gpus=gpus, hours=hours)
        outcome = found.outcome
        rows.append(
            [
                f"{gpus} GPUs",
                f"{outcome.figures.requests}",
                f"{outcome.events}",
                f"{found.cpu_s:.1f}",
                f"{found.wall_s:.1f}",
                f"{found.memory_bytes / 2**30:.2f}",
                f"{outcome.figures.attainment:.1%}",
            ]
        )
        if gpus in _LIMITS_S and not arguments.short:
            bounds.append(
                Bound(what=f"{gpus} GPUs", value=found.cpu_s, limit=_LIMITS_S[gpus], at_most=True, unit="s of CPU")
            )
    head = ["", "requests", "events", "CPU s", "on the clock s", "GiB", "in time"]
    table(f"{hours:g} hours at {_RATE_PER_S:g} requests/s for each {_GPUS} GPUs", head, rows)
    verdicts(bounds)
    write_json(arguments.json, {}, bounds)
    return 0


if __name__ == "__main__":
    run(main)
