"""How long one decision of the policy takes, by the number of candidates: 2 to 32 stages. CPU time of the thread.

python -m tests.bench.auto_decision
"""

import argparse
import time
from statistics import median

from planner.granularity import Candidate
from planner.load import EngineSample, LoadMonitor, Observation
from planner.policy import decide, initial_state
from planner.policy_candidates import candidates_for
from planner.policy_state import PolicyConstants
from planner.workload import Slo
from tests.unit.planner.test_policy_candidates import LENGTHS, of_stages


def busy_observation(*, rate_per_s: float, seconds: float) -> Observation:
    """Return what is seen after so long at such a rate; three windows, the longest of 1800 s."""
    monitor, count = LoadMonitor(began_s=0.0), int(rate_per_s * seconds)
    for index in range(count):
        monitor.arrived(index, index / rate_per_s)
        monitor.first_token(index, index / rate_per_s)
        monitor.ended(index, index / rate_per_s, output_tokens=50, tpot_s=0.02)
    monitor.sampled(seconds, EngineSample(running=3, waiting=0, kv_use=0.1))
    return monitor.observe(seconds)


def decision_times_s(candidates: tuple[Candidate, ...], seen: Observation, *, times: int, now_s: float) -> list[float]:
    """Return the seconds of each of ``times`` decisions."""
    state, constants, found = initial_state([candidates[0].num_stages], now_s=0.0), PolicyConstants(), []
    for _ in range(times):
        began_s = time.thread_time()
        decide(state, seen, candidates, now_s, constants)
        found.append(time.thread_time() - began_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=500)
    times = parser.parse_args().times
    seen = busy_observation(rate_per_s=20.0, seconds=600.0)
    print("candidates            median     p99")
    for counts in ((2, 4), (2, 4, 8, 16, 32), tuple(range(2, 33))):
        candidates = candidates_for([of_stages(count) for count in counts], LENGTHS, Slo())
        found = sorted(decision_times_s(candidates, seen, times=times, now_s=600.0))
        name = f"{len(counts)}, {counts[0]} to {counts[-1]} stages"
        print(f"{name:<20}{median(found) * 1e3:6.2f} ms{found[int(0.99 * len(found))] * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
