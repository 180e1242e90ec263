"""Two models on one host whose bursts alternate, each under automatic control: who takes devices, and how often."""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest

from flexpiped.settings import AutoMode, AutoSettings
from planner.simulation.outcome import most_in_a_minute
from tests.support.tenants import Host, sharing
from tests.unit.planner.planning_questions import host
from topology.units import MIB

SETTINGS = AutoSettings(mode=AutoMode.ON, max_replicas=3)
LOW_PER_S, HIGH_PER_S = 0.05, 1.8  # a replica of one stage serves 1.1
TIGHT, ROOMY = 12 * MIB, 64 * MIB  # of a device: for the one stage of one model, and for several of each


def alternating(*, period_s: float, until_s: float) -> Mapping[str, Sequence[float]]:
    """Return arrivals: a has its bursts in even periods, b in odd ones."""
    found: dict[str, list[float]] = {}
    for turn, name in enumerate("ab"):
        draw, now_s = random.Random(turn), 0.0
        arrivals = found[name] = []
        while now_s < until_s:
            is_busy = int(now_s // period_s) % 2 == turn
            now_s += draw.expovariate(HIGH_PER_S if is_busy else LOW_PER_S)
            arrivals.append(now_s)
    return found


async def seen(*, memory_bytes: int, devices: int, period_s: float, until_s: float, settings: AutoSettings) -> Host:
    topology = host(devices, memory_bytes=memory_bytes)
    async with sharing(topology, "a", "b", settings=settings) as found:
        await found.go_on(alternating(period_s=period_s, until_s=until_s), until_s=until_s)
    return found


@pytest.mark.parametrize(
    ("period_s", "until_s"),
    [(200.0, 800.0), (450.0, 1200.0), pytest.param(600.0, 6000.0, marks=pytest.mark.long)],
)
async def test_a_device_goes_to_the_other_model_only_once_it_was_not_needed_for_the_time_of_reclaim(
    period_s: float, until_s: float
) -> None:
    """Four devices, each with room for one stage: what one model has, the other cannot have."""
    found = await seen(memory_bytes=TIGHT, devices=4, period_s=period_s, until_s=until_s, settings=SETTINGS)
    handed = found.handed_over("a", "b")
    for device in {device for _, device, _ in handed}:
        times_s = [0.0, *(at_s for at_s, which, _ in handed if which == device)]
        assert all(later - at_s >= SETTINGS.reclaim_s for at_s, later in pairwise(times_s))
    for tenant in found.tenants:
        # Nobody tries to take what the other one has, but for a cut that was planned before the other one had it.
        assert [each for each in tenant.not_done if "no room for replica" in each] == []
        assert len(tenant.not_done) <= 1 + until_s / 1200
        assert len(tenant.began_s) <= 2 * until_s / SETTINGS.reclaim_s + 2
        assert most_in_a_minute(tenant.began_s) <= SETTINGS.changes_per_min
    assert (period_s < SETTINGS.reclaim_s) == (handed == [])


async def test_on_devices_with_room_for_both_neither_follows_the_other_about() -> None:
    """Eq 9 costs a layout score where the other model has stages, and no layout is changed for it back and forth."""
    found = await seen(memory_bytes=ROOMY, devices=8, period_s=200.0, until_s=1000.0, settings=SETTINGS)
    for tenant in found.tenants:
        assert len(tenant.began_s) <= 4
        assert tenant.late == 0
        assert "nothing is known of" not in tenant.last
