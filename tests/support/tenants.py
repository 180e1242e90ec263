"""Several models on one host, each under automatic control of its own: the daemon's own parts with fake engines.

Time is a clock that jumps from arrival to arrival; a model serves its requests one after the other, as fast as the
replicas that it has are predicted to.
"""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from flexpiped.auto import AutoControl
from flexpiped.auto_candidates import PlannedCandidates
from flexpiped.device_sharing import Held, together, topology_beside
from flexpiped.events import EventLog
from flexpiped.load_monitor import LoadSampler
from flexpiped.refactoring import Refactorings
from flexpiped.settings import AutoSettings
from flexpiped.target_resolver import PlannerResolver
from planner.workload import Slo
from tests.support.clock import Clock
from tests.support.costs import FlatCosts
from tests.support.until import until
from tests.unit.planner.planning_questions import question
from tests.unit.test_scaling import ScaleStand
from topology.topology import HostTopology

INTERVAL_S = 5.0
_SLO = Slo(ttft_s=20.0)
_PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 32


class Tenant(ScaleStand):
    """One model; at first one replica of one stage. ``others`` are on the same devices."""

    def __init__(
        self, name: str, *, clock: Clock, settings: AutoSettings, topology: HostTopology, planning: asyncio.Lock
    ) -> None:
        super().__init__()
        self.name = name
        self.others: list[Tenant] = []
        self.late = 0
        self.came = 0
        self.began_s: list[float] = []  # what it decided to do
        self.not_done: list[str] = []
        self.last = ""  # decision, in words
        self._free_s = 0.0  # when it has served all who came
        asked = question(topology=topology, slo=_SLO, costs=FlatCosts(decoder_s=0.04, token_s=4e-4))
        resolver = PlannerResolver(
            lambda: replace(asked, topology=topology_beside(topology, together(o.holds() for o in self.others))),
            clock=itertools.repeat(0.0).__next__,
        )
        self.planner = resolver
        fleet = self.fleet
        self.refactorings = Refactorings(
            engine=lambda: self.replicas.engines[0],
            resolver=lambda: resolver,
            events=self.events,
            fleet=fleet,
            planning=planning,
        )
        self.load = LoadSampler(clock=clock, slo=_SLO)
        self.candidates = PlannedCandidates(
            resolver=lambda: resolver,
            expected=asked.workload,
            slo=_SLO,
            serving=lambda: [each.pipeline for each in self.replicas.engines],
            clock=clock,
        )
        self.control = AutoControl(
            settings,
            engine=lambda: self.replicas.engines[0],
            load=self.load,
            candidates=self.candidates,
            refactorings=self.refactorings,
            rest=lambda: self.replicas,
            fleet=lambda: fleet.serving,
            engines=lambda: self.replicas.engines,
            decided=EventLog(),
            clock=clock,
        )

    def holds(self) -> Held:
        """Return what it holds of each device."""
        awake = [each.supervisor for each in self.replicas.all if not each.supervisor.is_asleep]
        return self.planner.held_by([each.pipeline for each in awake])

    @property
    def devices(self) -> frozenset[str]:
        return frozenset(device for device, held in self.holds().items() if held)

    async def look(self) -> None:
        """Look at the devices and decide, and let what was begun end."""
        self.load.devices_seen(self.planner.devices())
        before = self.control.decided.last_sequence
        decision = await self.control.cycle()
        assert decision is not None, "it is on"
        self.last = decision.reason
        if decision.action is not None:
            self.began_s.append(decision.at_s)
        await until(lambda: self.control.is_settled)
        self.not_done += [
            each.message for each in self.control.decided.since(before) if each.message.startswith("not done")
        ]

    def serve(self, now_s: float) -> float:
        """Return when one who comes now has got an answer."""
        known = {each.num_stages: each.throughput_per_s for each in self.control._found}
        rate_per_s = sum(known.get(stages, 0.0) for stages in self.fleet.serving.values()) or 1.0
        self._free_s = max(self._free_s, now_s) + 1 / rate_per_s
        self.came += 1
        self.late += self._free_s - now_s > (_SLO.ttft_s or 0.0)
        return self._free_s


@dataclass(slots=True, kw_only=True)
class Host:
    """The models, and who had which devices when that changed."""

    clock: Clock
    tenants: Sequence[Tenant]
    held: list[tuple[float, Mapping[str, frozenset[str]]]] = field(default_factory=list)

    async def go_on(self, arrivals_s: Mapping[str, Sequence[float]], *, until_s: float) -> None:
        """Have requests come, and each model's control loop look once an interval."""
        order = itertools.count()
        queue = [
            (at_s, next(order), tenant, request, True)
            for tenant in self.tenants
            for request, at_s in enumerate(arrivals_s[tenant.name])
        ]
        heapq.heapify(queue)
        while (now_s := self.clock.now_s // INTERVAL_S * INTERVAL_S + INTERVAL_S) <= until_s:
            while queue and queue[0][0] <= now_s:
                self.clock.now_s, _, tenant, request, comes = heapq.heappop(queue)
                if comes:
                    tenant.load.arrived(request)
                    heapq.heappush(queue, (tenant.serve(self.clock.now_s), next(order), tenant, request, False))
                else:
                    tenant.load.first_token(request)
                    tenant.load.ended(request, prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS, tpot_s=0.001)
            self.clock.now_s = now_s
            for tenant in self.tenants:
                await tenant.look()
            self._note(now_s)

    def _note(self, now_s: float) -> None:
        now = {each.name: each.devices for each in self.tenants}
        if not self.held or self.held[-1][1] != now:
            self.held.append((now_s, now))

    def handed_over(self, first: str, second: str) -> list[tuple[float, str, str]]:
        """Return when a device that only one of two models had last was taken by the other, and by whom."""
        owners: dict[str, str] = {}
        found = []
        for at_s, now in self.held:
            for device in now[first] ^ now[second]:
                owner = first if device in now[first] else second
                if owners.get(device, owner) != owner:
                    found.append((at_s, device, owner))
                owners[device] = owner
        return found


@asynccontextmanager
async def sharing(topology: HostTopology, *names: str, settings: AutoSettings) -> AsyncIterator[Host]:
    """Models of these names on a host; all end with the scope."""
    clock, planning = Clock(), asyncio.Lock()
    tenants = [Tenant(name, clock=clock, settings=settings, topology=topology, planning=planning) for name in names]
    for tenant in tenants:
        tenant.others = [other for other in tenants if other is not tenant]
    for tenant in tenants:
        await tenant.add(await asyncio.to_thread(tenant.planner.first, 1))
    yield Host(clock=clock, tenants=tenants)
    for tenant in tenants:
        await tenant.control.close()
        await tenant.refactorings.close()
        await tenant.replicas.close()
