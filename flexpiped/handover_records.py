"""What is asked of a refactoring, what it would do and how it went: plain values, and their form on the admin API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from engines.protocol import RefactorCheck, RefactorProgress
from flexpiped.config_values import Auto
from planner.handover import HandoverPhase
from planner.layout import Pipeline
from planner.memory import KvBudget, MemoryCheck
from topology.units import plural


class Way(Enum):
    """How a layout is changed."""

    IN_PLACE = "in place"  # layers and KV cache move within the engine
    REPLICA = "replica"  # a second instance starts beside the first and takes over its requests
    SCALE = "scale"  # no layout changes: replicas come or leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is asked for: a number of stages, or the text of a layout file. ``replica``: by a second instance.

    ``engine``: by an engine of that name; then stages and layout may be left out, and their number stays as it is.
    ``replicas``: so many instead of a change: stages and layout are then of those that come. ``on``: the number of the
    replica that changes or leaves; None: the main one, or any.
    """

    stages: int | Auto | None = None
    layout: str | None = None
    replica: bool = False
    engine: str | None = None
    replicas: int | None = None
    on: int | None = None

    @property
    def names_a_layout(self) -> bool:
        return self.stages is not None or self.layout is not None


class TargetResolver(Protocol):
    """Turns what is asked for into a pipeline. Pure work, which may take a while: it is called in a thread."""

    def resolve(
        self,
        wanted: Wanted,
        *,
        current: Pipeline,
        resident: Sequence[tuple[str, ...]] = (),
        taken: frozenset[str] = frozenset(),
    ) -> Pipeline:
        """Return the pipeline to change to, on devices that are not ``taken``.

        Raises:
            PlannerError: Nothing fits, or the layout is malformed; the message is for people.
        """

    def beside(self, wanted: Wanted, *, taken: frozenset[str]) -> Pipeline:
        """Return the pipeline of a replica more, on devices that are not ``taken``. Raises as ``resolve``."""

    def broken_rules(
        self, target: Pipeline, *, current: Pipeline | None, second_instance: bool = False
    ) -> tuple[str, ...]:
        """Return a sentence for each rule of the planner that ``target`` breaks: asked before every handover."""

    def check_second(
        self, *, current: Pipeline, target: Pipeline, kv: KvBudget, is_another_engine: bool = False
    ) -> MemoryCheck:
        """Say whether the devices can hold a second instance, with ``target``, beside the one with ``current``.

        ``kv`` is that of the first. The second's is the same, but for another engine as that is configured.

        Raises:
            InvalidLayout: ``target`` is not a layout of this model.
        """


def stages_in_words(pipeline: Pipeline) -> str:
    """Return how many stages it has: ``2 stages``."""
    return plural(pipeline.granularity, "stage")


def layouts_in_words(stages: Sequence[int]) -> str:
    """Return how many stages each replica has: ``2 stages``, or ``2 replicas (2 stages, 1 stage)``."""
    each = ", ".join(plural(count, "stage") for count in stages)
    return each if len(stages) == 1 else f"{len(stages)} replicas ({each})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """Replicas that come, by their pipelines, or leave, by their numbers; how many serve ``before`` and ``after``.

    ``is_restart``: those that come were there before the daemon was started again: one that does not start keeps the
    others from nothing.
    """

    before: int
    after: int
    add: tuple[Pipeline, ...] = ()
    remove: tuple[int, ...] = ()
    is_restart: bool = False

    @property
    def sentences(self) -> tuple[str, ...]:
        """What comes and leaves, in words."""
        coming = tuple(
            f"a replica of {stages_in_words(each)} on {', '.join(each.device_ids)} comes" for each in self.add
        )
        return coming + tuple(f"replica {number} drains and ends" for number in self.remove)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What a refactoring would do, with the numbers of the feasibility check. ``on``: the replica that it concerns."""

    current: Pipeline
    target: Pipeline
    check: RefactorCheck
    way: Way = Way.IN_PLACE
    engine_before: str = ""
    engine_after: str = ""  # empty: the engine stays
    on: int | None = None
    scale: ScalePlan | None = None

    @property
    def changes_something(self) -> bool:
        return self.current != self.target or bool(self.engine_after) or self.scale is not None

    @property
    def layers_moved(self) -> int:
        """How many layers change their device; embedding and head count as layers."""
        before, after = self.current, self.target
        places = [(before.stages[0], after.stages[0]), (before.stages[-1], after.stages[-1])]
        places += [(before.stage_of(i), after.stage_of(i)) for i in range(min(before.num_decoders, after.num_decoders))]
        return sum(old.device_ids != new.device_ids for old, new in places)

    @property
    def stages_text(self) -> str:
        if self.scale is not None:
            return f"{self.scale.before} -> {self.scale.after} replicas"
        text = f"{self.current.granularity} -> {self.target.granularity} stages"
        engines = f"{self.engine_before} -> {self.engine_after}, " if self.engine_after else ""
        return text if self.way is Way.IN_PLACE else f"{engines}{text} by replica"


class HandoverResult(Enum):
    DONE = "done"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverRecord:
    """How a refactoring went, kept for ``flexctl status``."""

    number: int
    stages_before: int
    stages_after: int
    result: HandoverResult
    message: str
    finished_unix_s: float
    duration_s: float
    layers_moved: int
    last: RefactorProgress | None  # None: it ended before its first report
    way: Way = Way.IN_PLACE
    engine_before: str = ""
    engine_after: str = ""  # empty: the engine stayed
    what: str = ""  # in words: ``2 -> 4 stages``
    phases_s: Mapping[HandoverPhase, float] = field(default_factory=dict)  # up to the last report


def pipeline_to_wire(pipeline: Pipeline) -> list[dict[str, Any]]:
    """Return the stages as JSON values."""
    return [
        {"device_ids": list(stage.device_ids), "first_decoder": stage.first_decoder, "end_decoder": stage.end_decoder}
        for stage in pipeline.stages
    ]


def proposal_to_wire(proposal: Proposal) -> dict[str, Any]:
    """Return the proposal as JSON values."""
    return {
        "current": pipeline_to_wire(proposal.current),
        "target": pipeline_to_wire(proposal.target),
        "way": proposal.way.value,
        **_engines_to_wire(proposal),
        "what": proposal.stages_text,
        "on": proposal.on,
        "scale": None if proposal.scale is None else _scale_to_wire(proposal.scale),
        "changes_something": proposal.changes_something,
        "feasible": proposal.check.feasible,
        "sentences": list(proposal.check.sentences),
        "moves": list(proposal.check.moves),
    }


def _scale_to_wire(plan: ScalePlan) -> dict[str, Any]:
    return {"add": [pipeline_to_wire(each) for each in plan.add], "remove": list(plan.remove)}


def _engines_to_wire(change: Proposal | HandoverRecord) -> dict[str, Any]:
    """Return which engine gives way to which; both None where it stays."""
    if not change.engine_after:
        return {"engine_before": None, "engine_after": None}
    return {"engine_before": change.engine_before, "engine_after": change.engine_after}


def progress_to_wire(progress: RefactorProgress) -> dict[str, Any]:
    """Return one report of progress as JSON values."""
    return {
        "phase": progress.phase.value,
        "message": progress.message,
        "elapsed_s": progress.elapsed_s,
        "weights_bytes": progress.weights_bytes,
        "weights_total_bytes": progress.weights_total_bytes,
        "kv_round": progress.kv_round,
        "kv_bytes": progress.kv_bytes,
        "kv_round_bytes": list(progress.kv_round_bytes),
        "commit_pause_s": progress.commit_pause_s,
        "drain_s": progress.drain_s,
        "returned_bytes": progress.returned_bytes,
        "epoch": progress.epoch,
        "requests_live": progress.requests_live,
    }


def record_to_wire(record: HandoverRecord) -> dict[str, Any]:
    """Return the record of a refactoring that ended as JSON values."""
    return {
        "number": record.number,
        "way": record.way.value,
        **_engines_to_wire(record),
        "what": record.what,
        "stages_before": record.stages_before,
        "stages_after": record.stages_after,
        "result": record.result.value,
        "message": record.message,
        "finished_unix_s": record.finished_unix_s,
        "duration_s": record.duration_s,
        "phases_s": {phase.value: took_s for phase, took_s in record.phases_s.items()},
        "layers_moved": record.layers_moved,
        "progress": None if record.last is None else progress_to_wire(record.last),
    }
