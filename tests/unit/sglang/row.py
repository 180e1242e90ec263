"""Ranks in a row as the conductor has them, without SGLang: each slot reaches all of them."""

import sys
from dataclasses import dataclass, field
from typing import Any

from engines.served.plugin_path import SHARED

sys.path += [str(SHARED.parents[1] / "sglang" / "plugin"), str(SHARED)]  # as SGLang's interpreter has it

from flexpiped_served.failpoints import Failpoints
from flexpiped_sglang.conductor import Conductor
from flexpiped_sglang.slots import Command, Slots

RANKS = 3
DRAIN_SLOTS = RANKS
LAYOUT, NEW_LAYOUT = [0, 0, 1, 2], [0, 1, 1, 2]


class FakeScheduler:
    """What the loop of a scheduler calls once in a slot."""

    _engine_paused = False
    running_batch: str = "running"
    last_batch: object = None

    def __init__(self) -> None:
        self.taken: list[object] = []

    def _poll_timeout_aborts(self) -> list[object]:
        return []

    def process_input_requests(self, recv_reqs: list[object]) -> None:
        self.taken += recv_reqs

    def get_next_batch_to_run(self, running_batch: str, last_batch: object) -> str:  # noqa: ARG002
        return "a batch" if running_batch == "running" else "no batch"

    def _pp_microbatches_drained(self) -> bool:
        return True

    def _collect_inflight_batches(self) -> list[object]:
        return []


@dataclass
class FakeRequest:
    ended: bool = False

    def finished(self) -> bool:
        return self.ended


@dataclass
class FakeBatch:
    reqs: list[FakeRequest]


@dataclass
class Row:
    """Ranks in a row: each slot's requests go from one to the next."""

    answer_of: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    replies: list[dict[str, Any]] = field(default_factory=list)
    seen: list[list[tuple[int, Command]]] = field(default_factory=list)
    slot: int = 0
    mute: bool = False
    late: int | None = None  # the rank whose answers to the copy come with that to the switch
    group: int = 1  # ranks of a stage

    def __post_init__(self) -> None:
        ranks = RANKS * self.group
        self.schedulers = [FakeScheduler() for _ in range(ranks)]
        self.seen = [[] for _ in range(ranks)]
        self.slots = [
            Slots(
                scheduler,
                before_slot=lambda: self.conductor.on_slot(),
                on_command=lambda command, rank=rank: self.command(rank, command),
                on_slot=lambda: None,
                no_batch=lambda _running: "no batch",
                would_run=lambda running, _last: running == "running",
            )
            for rank, scheduler in enumerate(self.schedulers)
        ]
        self.failpoints = Failpoints()
        self.conductor = Conductor(
            self.slots[0],
            layout=LAYOUT,
            stages=RANKS,
            group=self.group,
            drain_slots=DRAIN_SLOTS,
            failpoints=self.failpoints,
        )
        self.held_up: list[tuple[int, dict[str, Any]]] = []  # tickets and answers of the late rank

    def command(self, rank: int, command: Command) -> None:
        self.seen[rank].append((self.slot, command))
        name, *arguments = command
        if name == "hold":
            self.slots[rank].held_by.add(arguments[0])
        elif name == "release":
            self.slots[rank].held_by.discard(arguments[0])
        elif name == "switch":
            self.switch(rank, *arguments)
        elif name not in ("begin", "abandon") and not self.mute:
            answers = self.answer_of.get(name, [{}] * len(self.slots))
            if rank == self.late:
                self.held_up.append((arguments[0], answers[rank]))
            else:
                self.conductor.on_answer(arguments[0], rank, answers[rank])

    def switch(self, rank: int, ticket: int, _number: int, _epoch: int, holder: str) -> None:
        """As a rank: one that fails lets no batch pass. What it has answered before arrives before."""
        if rank == self.late:
            for earlier, held_up in self.held_up:
                self.conductor.on_answer(earlier, rank, held_up)
        given = self.answer_of.get("switch", [{}] * len(self.slots))[rank]
        answer = {"slot": self.slots[rank].number} | given
        if "error" not in answer:
            self.slots[rank].held_by.discard(holder)
        self.conductor.on_answer(ticket, rank, answer)

    def run(self, slots: int, requests: tuple[object, ...] = ()) -> list[list[str]]:
        """Run slots; return what each rank ran in each."""
        ran = []
        for _ in range(slots):
            passed = [*requests, *self.schedulers[0]._poll_timeout_aborts()]
            for scheduler in self.schedulers:
                scheduler.process_input_requests(list(passed))
            ran.append([s.get_next_batch_to_run(s.running_batch, s.last_batch) for s in self.schedulers])
            if ran[-1][0] == "a batch":
                self.conductor.dispatched()
            self.slot += 1
        return ran

    def ask(self, method: str, *arguments: object) -> None:
        self.conductor.take(f"flexpiped_{method}", list(arguments), self.replies.append, 1)
