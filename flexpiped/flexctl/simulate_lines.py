"""What was simulated, and what it took of the devices, as lines (pure)."""

from collections.abc import Mapping

from flexpiped.flexctl.text import format_duration, table, wrapped
from planner.simulation.outcome import Outcome


def fleet_facts(outcome: Outcome) -> list[tuple[str, str]]:
    """Return name and value of what the fleet did."""
    stall = "none" if outcome.stall_recovery_s is None else f"{format_duration(outcome.stall_recovery_s)} median"
    start = "" if outcome.mean_start_s is None else f", {format_duration(outcome.mean_start_s)} each in the mean"
    return [
        ("queue", f"{outcome.queue_mean:.1f} in the mean, {outcome.queue_most} at most"),
        ("stalls", f"{outcome.stalls}, recovery {stall}"),
        (
            "devices reserved",
            f"{outcome.reserved_device_s / max(1e-9, outcome.simulated_s):.1f} in the mean, {outcome.most_devices} at "
            f"most; always on {outcome.always_on:.0%} of the most; {outcome.utilisation:.0%} of the time in use",
        ),
        ("efficiency", f"{outcome.goodput_per_device_s:.4f} requests in time for each reserved device-second"),
        (
            "decisions",
            f"{outcome.decisions} that changed something, at most {outcome.most_decisions_per_min} a minute",
        ),
        ("changes", f"{outcome.changes} of granularity"),
        ("starts", f"{outcome.starts}{start}; {outcome.evicted} replicas gave way to neighbours"),
    ]


def fleet_lines(outcome: Outcome) -> list[str]:
    return table([[name, value] for name, value in fleet_facts(outcome)])


def scenario_lines(scenario: Mapping[str, str]) -> list[str]:
    """Return what is simulated, and where its times come from, which may say what would make them better."""
    width = max(map(len, scenario))
    return [line for name, value in scenario.items() for line in wrapped(value, head=f"  {name:{width}}   ")]
