"""Other systems, each as its paper says, with the replicas, devices and requests of the simulation.

What such a system does besides (another engine, another scheduler within it) is not modelled.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil

from planner.load import Observation
from planner.policy_state import known
from planner.simulation.fleet import Fleet
from planner.simulation.members import MemberState
from planner.simulation.outlooks import Outlooks
from planner.workload import Workload


@dataclass(kw_only=True)
class Static:
    """Replicas of one granularity, always on: as many as ``replicas`` says, or as there is room for."""

    num_stages: int
    replicas: int

    def begin(self, fleet: Fleet) -> None:
        for _ in range(self.replicas):
            if not fleet.add(self.num_stages, start_s=0.0):
                return

    def tick(self, observation: Observation, now_s: float) -> str:  # noqa: ARG002
        return "static"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return next_s


@dataclass(kw_only=True)
class Full:
    """All the room that there is, always on: replicas of one granularity, then others in what that leaves."""

    num_stages: int

    def begin(self, fleet: Fleet) -> None:
        for stages in (self.num_stages, *sorted(fleet.shapes)):
            while fleet.add(stages, start_s=0.0):
                pass

    def tick(self, observation: Observation, now_s: float) -> str:  # noqa: ARG002
        return "static"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return next_s


@dataclass(kw_only=True)
class BestStatic:
    """The static placement that is predicted to serve the expected traffic best, always on.

    Source: Li et al., AlpaServe, OSDI 2023: model parallelism and placement are chosen ahead for a given workload by
    goodput under the SLO, with as many replicas as devices allow. Its search is over placements of many models; with
    one model it is over granularities and replicas, which are tried here, predicted by the planner.
    """

    outlooks: Outlooks
    expected: Workload

    def begin(self, fleet: Fleet) -> None:
        options = []
        for stages, shape in fleet.shapes.items():
            placed = fleet.pool.find(shape, now_s=0.0, placing=fleet.placing)
            room = fleet.pool.room_for(shape, placing=fleet.placing)
            if placed is not None and room:
                found = self.outlooks.predict(shape, self.expected, kv_tokens=placed.kv_tokens, replicas=room)
                options.append((found.goodput_per_s, -found.ttft_p99_s, stages, room))
        if options:
            _, _, stages, room = max(options)
            Static(num_stages=stages, replicas=room).begin(fleet)

    def tick(self, observation: Observation, now_s: float) -> str:  # noqa: ARG002
        return "static"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return next_s


@dataclass(kw_only=True)
class FastColdStart:
    """Whole replicas of one granularity come and go with the requests, quickly started from host memory or SSD.

    Source: Fu et al., ServerlessLLM, OSDI 2024: loading 3.6 to 8.2 times as fast, replicas are started where the
    checkpoint is near, and go after a keep-alive without requests. Its scaler is one of concurrency, as serverless
    platforms have it: ``per_replica`` requests in flight for each replica.
    """

    num_stages: int
    per_replica: float
    load_speedup: float = 6.0
    keep_alive_s: float = 60.0
    least: int = 1
    _surplus_since_s: float | None = None

    def begin(self, fleet: Fleet) -> None:
        self._fleet = fleet
        for _ in range(self.least):
            fleet.add(self.num_stages, start_s=0.0)

    def tick(self, observation: Observation, now_s: float) -> str:  # noqa: ARG002
        fleet = self._fleet
        live = len(fleet.gateway) + sum(each.replica.live for each in fleet.members)
        wanted = max(self.least, ceil(live / self.per_replica))
        have = len(fleet.stages) + fleet.coming
        if wanted >= have:
            self._surplus_since_s = None
        if wanted > have:
            shape = fleet.shapes[self.num_stages]
            for _ in range(wanted - have):
                fleet.add(self.num_stages, start_s=shape.cold_s / self.load_speedup)
            return f"{live} in flight: {wanted} replicas"
        if wanted < have:
            self._surplus_since_s = now_s if self._surplus_since_s is None else self._surplus_since_s
            if now_s - self._surplus_since_s >= self.keep_alive_s:
                self._surplus_since_s = None
                for _ in range(have - wanted):
                    fleet.remove(self.num_stages)
                return f"{live} in flight: {wanted} replicas"
        return "keep"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return next_s if self._surplus_since_s is None else now_s


@dataclass(kw_only=True)
class Oracle:
    """Knows all arrivals, and starts replicas at once, for nothing.

    No proven limit: it still plans by predicted capacity and mean lengths, and replicas that it gives up hold their
    devices until their last request has ended, so a change of granularity can find no room.

    Each tick it has the granularity, and the number of replicas, that serve the most that will come within the next
    ``ahead_s`` at ``load``, on the fewest devices.
    """

    outlooks: Outlooks
    expected: Workload
    arrivals_s: Sequence[float]
    ahead_s: float = 20.0
    load: float = 0.7
    _next: int = 0

    def begin(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._become(*self._wanted(0.0))

    def tick(self, observation: Observation, now_s: float) -> str:
        waiting = known(observation.queue_length, 0.0)
        stages, count = self._wanted(now_s, waiting=waiting)
        self._become(stages, count)
        return f"{count} of {stages} stages for what will come"

    def rests_until_s(self, observation: Observation, now_s: float, *, next_s: float) -> float:  # noqa: ARG002
        return max(now_s, next_s - self.ahead_s)

    def _wanted(self, now_s: float, *, waiting: float = 0.0) -> tuple[int, int]:

        parts = [now_s + self.ahead_s * share for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        edges = [bisect_left(self.arrivals_s, each) for each in parts]
        most = max(b - a for a, b in pairwise(edges)) / (self.ahead_s / 4)
        coming = replace(self.expected, rate_per_s=max(1e-3, most + waiting / self.ahead_s), cv=1.0)
        return self._cheapest(coming)

    def _cheapest(self, coming: Workload) -> tuple[int, int]:
        fleet = self._fleet
        options = []
        for stages, shape in fleet.shapes.items():
            members = [each for each in fleet.members if each.shape is shape and each.state is MemberState.SERVING]
            room = fleet.pool.room_for(shape, placing=fleet.placing) + len(members)
            placed = fleet.pool.find(shape, now_s=fleet.clock.now_s, placing=fleet.placing)
            kv_tokens = members[0].placed.kv_tokens if members else placed.kv_tokens if placed else 0
            if not room or not kv_tokens:
                continue
            found = self.outlooks.predict(shape, coming, kv_tokens=kv_tokens)
            if found.capacity_per_s <= 0:
                continue
            count = ceil(coming.rate_per_s / (found.capacity_per_s * self.load))
            serves = min(count, room) * found.capacity_per_s * self.load >= coming.rate_per_s
            devices = count * stages if serves else -room * found.capacity_per_s
            options.append((not serves, devices, stages, count, room))
        if not options:
            return min(fleet.shapes), 1
        _, _, stages, count, room = min(options)
        return stages, max(1, min(count, room))

    def _become(self, stages: int, count: int) -> None:
        fleet = self._fleet
        have = sum(each == stages for each in fleet.stages)
        for _ in range(count - have):
            if not fleet.add(stages, start_s=0.0):
                break
        for other in [each for each in fleet.stages if each != stages]:
            fleet.remove(other)
        for _ in range(have - count):
            fleet.remove(stages)
