"""The replicas that serve, and the gateway before them: requests are routed, replicas come, change and go."""

from collections import deque
from collections.abc import Callable
from math import inf
from typing import assert_never

from planner.prediction import Pipeline
from planner.routing import NEWEST, Job, Option, Pace, choose_replica
from planner.simulation.clock import Clock
from planner.simulation.members import FleetEvents, Member, MemberState, Reserved, devices_of
from planner.simulation.pool import DevicePool, Placed, Placing, PoolDevice
from planner.simulation.replica import Replica, SimulatedRequest
from planner.simulation.shape import Shape, Shapes
from planner.simulation.standing import Expectation, Standing
from planner.simulation.step_times import StepTimes
from planner.workload import Workload


class Fleet:
    """All replicas of the model."""

    def __init__(
        self,
        clock: Clock,
        pool: DevicePool,
        shapes: Shapes,
        events: FleetEvents,
        *,
        placing: Placing,
        expected: Workload,
        drain_deadline_s: float = inf,
    ) -> None:
        self.clock = clock
        self.pool = pool
        self.shapes = shapes
        self.placing = placing
        self.members: list[Member] = []
        self.gateway: deque[SimulatedRequest] = deque()
        self.reserved = Reserved()
        self.busy_s = 0.0  # of replicas that are gone
        self.starts_s: list[float] = []
        self.changes = 0
        self.begun = 0  # replicas that were told to come, go or change
        self.evicted = 0
        self._events = events
        self._steps: dict[tuple[int, int], StepTimes] = {}
        self._names = 0
        self._expected = expected
        self._drain_deadline_s = drain_deadline_s
        self._lengths = Expectation(expected.output_tokens_mean)
        self._paces: dict[StepTimes, Pace] = {}
        self._open: tuple[list[Member], list[Option]] | None = None  # those that serve, as routing sees them

    # --- requests ---

    def submit(self, request: SimulatedRequest) -> None:
        """Send a request where the daemon would; it waits where none serves.

        Its output is expected to be as long as others were lately: nobody knows how long it will be.
        """
        serving, options = self._serving()
        if not serving:
            self.gateway.append(request)
            return
        if len(serving) == 1:
            serving[0].replica.submit(request)
            return
        job = Job(
            context_tokens=request.context_tokens,
            prefill_tokens=request.context_tokens,
            output_tokens=self._lengths.output_tokens,
        )
        serving[choose_replica(job, options).replica].replica.submit(request)

    def _serving(self) -> tuple[list[Member], list[Option]]:
        """Return those that serve. Requests come by the hundred between two changes, so it is kept until the next."""
        if self._open is None:
            serving = [each for each in self.members if each.state is MemberState.SERVING]
            self._open = serving, [self._option(index, each) for index, each in enumerate(serving)]
        return self._open

    def _option(self, index: int, member: Member) -> Option:
        steps = member.replica.steps
        load = Standing(member.replica, self._lengths)
        return Option(index, load, steps.times.kv_capacity_tokens, 0, self._pace_of(steps))

    def _pace_of(self, steps: StepTimes) -> Pace:
        """Return the predicted pace of a replica, as the daemon predicts it: for what is expected of requests."""
        found = self._paces.get(steps)
        if found is None:
            found = self._paces[steps] = Pipeline(steps.times, self._expected)
        return found

    # --- what a policy does ---

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of stages of each replica that serves."""
        return tuple(sorted(each.shape.num_stages for each in self.members if each.state is MemberState.SERVING))

    @property
    def is_at_rest(self) -> bool:
        """Whether nobody is there, and no replica comes, goes or changes."""
        members = self.members
        is_settled = all(each.state is MemberState.SERVING and each.target is None for each in members)
        return is_settled and not self.gateway and not any(each.replica.live for each in members)

    @property
    def coming(self) -> int:
        return sum(each.state is MemberState.STARTING for each in self.members)

    def add(self, num_stages: int, *, start_s: float | None = None, done: Callable[[bool], None] | None = None) -> bool:
        """Begin a replica; ``start_s`` None: as its shape and where its parameters are say. False: no room."""
        shape = self.shapes[num_stages]
        placed = self.pool.find(shape, now_s=self.clock.now_s, placing=self.placing)
        if placed is None:
            if done is not None:
                done(False)
            return False
        self._count()
        self.pool.take(placed)
        self._names += 1
        member = Member(
            replica=self._replica(shape, placed.kv_tokens), shape=shape, placed=placed, state=MemberState.STARTING
        )
        self.members.append(member)
        self.begun += 1
        self._count()
        takes_s = (shape.warm_s if placed.is_warm else shape.cold_s) if start_s is None else start_s
        self.starts_s.append(takes_s)
        self.clock.at(self.clock.now_s + takes_s, lambda: self._serve(member, done))
        return True

    def remove(self, num_stages: int, *, done: Callable[[bool], None] | None = None) -> bool:
        """Drain the least busy replica of a granularity and end it; ``done`` hears it then. False: there is none.

        What it has not finished by the deadline goes on at others.
        """
        having = [each for each in self._changeable() if each.shape.num_stages == num_stages]
        if not having:
            if done is not None:
                done(False)
            return False
        member = min(having, key=lambda each: each.replica.live)
        member.state, member.gone = MemberState.DRAINING, done
        self.begun += 1
        self._open = None
        self._end_if_drained(member)
        if member in self.members and self._drain_deadline_s < inf:
            self.clock.at(self.clock.now_s + self._drain_deadline_s, lambda: self._cut_off(member))
        return True

    def change(
        self, from_stages: int, num_stages: int, *, free: bool = False, done: Callable[[bool], None] | None = None
    ) -> bool:
        """Refactor one replica while it serves; ``free``: without preparation and pause. False: it does not fit."""
        having = [each for each in self._changeable() if each.shape.num_stages == from_stages]
        member = min(having, key=lambda each: each.replica.live, default=None)
        shape = self.shapes[num_stages]
        placed = None if member is None else self._find_beside(member, shape)
        if member is None or placed is None:
            if done is not None:
                done(False)
            return False
        member.target = (shape, placed)
        self.changes += 1
        self.begun += 1
        takes_s = 0.0 if free else shape.prepare_s
        self.clock.at(self.clock.now_s + takes_s, lambda: self._commit(member, 0.0 if free else shape.pause_s, done))
        return True

    def place_instead(self, shape: Shape) -> Placed | None:
        """Return where a replica would go in the place of one that serves, the one that leaves it most KV cache."""
        found = [placed for each in self._changeable() if (placed := self._find_beside(each, shape)) is not None]
        return max(found, key=lambda placed: placed.kv_tokens, default=None)

    def layout_changed(self) -> None:
        """Tell that others serve now than before."""
        self._events.on_layout()

    def busy_total_s(self) -> float:
        """Return the seconds that stages have computed, all together."""
        return self.busy_s + sum(each.replica.busy_s for each in self.members)

    def count_reserved(self) -> Reserved:
        """Return what has been reserved up to now."""
        self._count()
        return self.reserved

    def neighbours_changed(self, device: PoolDevice) -> None:
        """Neighbours have taken or freed memory of a device: the KV cache there shrinks or grows at once.

        Where not even the least KV cache is left, the replica goes, and its requests are computed again elsewhere.
        """
        for member in [each for each in self.members if device in each.placed.devices]:
            placed = member.placed
            room = min(each.free_bytes for each in placed.devices) + placed.bytes_each
            room = min(room, *(each.total_bytes - each.others_bytes for each in placed.devices))
            kv_tokens = member.shape.kv_tokens(room)
            if kv_tokens < member.shape.min_kv_tokens:
                self._evict(member)
            elif kv_tokens != placed.kv_tokens:
                self._count()
                self.pool.resize(placed, member.shape, kv_tokens=kv_tokens)
                member.replica.change(self._steps_of(member.shape, kv_tokens), pause_s=0.0)
                self._open = None

    # --- how ---

    def _evict(self, member: Member) -> None:
        self.evicted += 1
        if member.state is MemberState.SERVING:
            self.layout_changed()
        self._end(member)

    def _cut_off(self, member: Member) -> None:
        """End a replica whose requests have had long enough; nothing where it has ended since."""
        if member in self.members:
            self._end(member)

    def _end(self, member: Member) -> None:
        """End a replica; what it has not finished goes on at others."""
        self._count()
        requests = member.replica.take_all()
        self.pool.give_back(member.placed, now_s=self.clock.now_s)
        self.busy_s += member.replica.busy_s
        self.members.remove(member)
        self._open = None
        self._count()
        for request in requests:
            self.submit(request)
        if member.gone is not None:
            member.gone(True)

    def _changeable(self) -> list[Member]:
        return [each for each in self.members if each.state is MemberState.SERVING and each.target is None]

    def _find_beside(self, member: Member, shape: Shape) -> Placed | None:
        return self.pool.find(
            shape,
            now_s=self.clock.now_s,
            placing=self.placing,
            freed=member.placed.devices,
            freed_bytes=member.placed.bytes_each,
        )

    def _replica(self, shape: Shape, kv_tokens: int) -> Replica:
        return Replica(
            self.clock,
            self._steps_of(shape, kv_tokens),
            name=f"{self._names}",
            on_end=self._ended,
            on_first=self._events.on_first,
        )

    def _steps_of(self, shape: Shape, kv_tokens: int) -> StepTimes:
        key = (shape.num_stages, kv_tokens)
        if key not in self._steps:
            self._steps[key] = StepTimes(shape.times_with(kv_tokens))
        return self._steps[key]

    def _ended(self, request: SimulatedRequest) -> None:
        self._lengths.output_tokens += (request.output_tokens - self._lengths.output_tokens) * NEWEST
        self._events.on_end(request)
        if len(self._serving()[0]) < len(self.members):
            for member in [each for each in self.members if each.state is MemberState.DRAINING]:
                self._end_if_drained(member)

    def _serve(self, member: Member, done: Callable[[bool], None] | None) -> None:
        if member not in self.members:  # neighbours took its memory while it started
            if done is not None:
                done(False)
            return
        member.state = MemberState.SERVING
        self._open = None
        while self.gateway:
            self.submit(self.gateway.popleft())
        if done is not None:
            done(True)

    def _commit(self, member: Member, pause_s: float, done: Callable[[bool], None] | None) -> None:
        """Switch to the target, on devices that are looked for again: neighbours may have moved meanwhile."""
        assert member.target is not None
        shape, _ = member.target
        member.target = None
        placed = self._find_beside(member, shape) if member in self.members else None
        if placed is None:
            if done is not None:
                done(False)
            return
        self._count()
        self.pool.give_back(member.placed, now_s=self.clock.now_s)
        self.pool.take(placed)
        member.shape, member.placed = shape, placed
        member.replica.change(self._steps_of(shape, placed.kv_tokens), pause_s=pause_s)
        self._open = None
        self._count()
        if done is not None:
            done(True)

    def _end_if_drained(self, member: Member) -> None:
        match member.state:
            case MemberState.DRAINING if member.replica.live == 0:
                self._end(member)
            case MemberState.STARTING | MemberState.SERVING | MemberState.DRAINING:
                pass
            case _:
                assert_never(member.state)

    def devices_held(self) -> int:
        return devices_of(self.members)

    def _count(self) -> None:
        self.reserved.count(self.members, now_s=self.clock.now_s)
