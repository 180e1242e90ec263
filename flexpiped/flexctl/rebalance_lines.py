"""``flexctl rebalance``: from the events of a refactoring to one line for each phase. Pure functions and values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from flexpiped.flexctl.text import NO_BREAK, PLAIN, Colour, Paint, bar, format_duration, wrapped
from topology.units import format_bytes, plural

Json = Mapping[str, Any]

_HEAD: Final = 9  # columns before what is said of a phase
_MOVE: Final = re.compile(r"\S+ \S+ -> \S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What has been shown so far: the phase under way and where it began."""

    phase: str | None = None
    began_s: float = 0.0
    last: Json = field(default_factory=dict)
    by_replica: bool = False


def advance(view: View, progress: Json) -> tuple[View, list[str]]:
    """Take one report. Return the next view and the lines of phases that are over.

    Counters are cumulative over the refactoring, so the line of a phase that is over is written from the report that
    ended it. A replica handover is told in words: the last that a phase had, but for sync the number that ended it.
    """
    phase = progress["phase"]
    if phase == view.phase:
        return replace(view, last=progress), []
    told_itself = view.by_replica and view.phase not in (None, "sync")
    ended = {**progress, "message": view.last["message"]} if told_itself else progress
    done = "" if view.phase is None else _line_of(view, ended)
    return replace(view, phase=phase, began_s=progress["elapsed_s"], last=progress), _wrapped(done) if done else []


def current_line(view: View) -> str:
    """Return the line of the phase under way; empty when there is nothing to show."""
    return "" if view.phase is None else _line_of(view, view.last)


def _line_of(view: View, progress: Json) -> str:
    write = replica_line if view.by_replica else phase_line
    return "" if view.phase is None else write(view.phase, progress, began_s=view.began_s)


def replica_line(phase: str, progress: Json, *, began_s: float) -> str:
    """Return the line of one phase of a replica handover: nothing moves, so it has no bytes and no rounds."""
    took = format_duration(max(0.0, progress["elapsed_s"] - began_s))
    match phase:
        case "prepare" | "sync" | "retire":
            return _line(phase, progress["message"], took)
        case "commit":
            return _line(phase, f"the second instance is in force, epoch {progress['epoch']}")
        case "roll back":
            return _line(phase, progress["message"])
        case _:
            return ""


def phase_line(phase: str, progress: Json, *, began_s: float) -> str:
    """Return the line of one phase, as far as ``progress`` tells."""
    took = format_duration(max(0.0, progress["elapsed_s"] - began_s))
    match phase:
        case "prepare":
            return _line(phase, _prepared(progress, is_over=progress["phase"] != phase), took)
        case "sync":
            sent = [f"round {n}: {format_bytes(size)}" for n, size in enumerate(progress["kv_round_bytes"], start=1)]
            return _line(phase, *(sent or ["nothing to copy"]), took)
        case "commit":
            return _line(phase, _committed(progress))
        case "retire":
            return _line(phase, f"{format_bytes(progress['returned_bytes'])} returned", took)
        case "roll back":
            return _line(phase, progress["message"])
        case _:
            return ""


def plan_lines(proposal: Json) -> list[str]:
    """Return what will move, in the engine's words."""
    if is_scaling(proposal):
        return _wrapped(_line("plan", f"{proposal['what']}: {', '.join(proposal['moves'])}"))
    before, after = str(len(proposal["current"])), plural(len(proposal["target"]), "stage")
    if is_by_replica(proposal):
        after += " by replica"
    if proposal.get("engine_after"):
        before = f"{proposal['engine_before']} -> {proposal['engine_after']}, {before}"
    moves = _MOVE.sub(lambda move: move[0].replace(" ", NO_BREAK), ", ".join(proposal["moves"])) or "nothing moves"
    return _wrapped(_line("plan", f"{before} -> {after}: {moves}"))


def is_by_replica(answer: Json) -> bool:
    """Whether a proposal or record is of a replica handover."""
    return answer.get("way") == "replica"


def is_scaling(answer: Json) -> bool:
    """Whether a proposal or record is of replicas that come or leave."""
    return answer.get("way") == "scale"


def need_lines(proposal: Json) -> list[str]:
    """Return the numbers of the feasibility check, one line for each device that gains something."""
    return [line for sentence in proposal["sentences"] for line in _wrapped(_line("", sentence))]


def end_lines(record: Json, *, paint: Paint = PLAIN) -> list[str]:
    """Return how a refactoring ended."""
    if record["result"] != "done":
        return named_lines(record["result"], record["message"], paint=paint)
    if is_scaling(record):
        done = paint("done", Colour.GREEN)
        first, *rest = wrapped(record["message"], head=f"done in {format_duration(record['duration_s'])}: ")
        return [done + first.removeprefix("done"), *rest]
    went_on = plural(record["progress"]["requests_live"], "request")
    return [f"{paint('done', Colour.GREEN)} in {format_duration(record['duration_s'])}, {went_on} went on"]


def named_lines(bad: str, message: str, *, paint: Paint = PLAIN) -> list[str]:
    """Return a message behind the word for what went wrong, in red."""
    first, *rest = wrapped(message, head=f"{bad}: ")
    return [paint(bad, Colour.RED) + first.removeprefix(bad), *rest]


def _line(phase: str, *parts: str) -> str:
    return f"{phase:<{_HEAD - 2}}  " + "   ".join(part for part in parts if part)


def _wrapped(line: str) -> list[str]:
    return wrapped(line[_HEAD:], head=line[:_HEAD])


def _prepared(progress: Json, *, is_over: bool) -> str:
    loaded = progress["weights_bytes"]
    total = loaded if is_over else max(loaded, progress["weights_total_bytes"])
    if not total:
        return "no weights to load"
    size = format_bytes(total) if loaded >= total else f"{format_bytes(loaded)} of {format_bytes(total)}"
    return f"{bar(loaded, total)}  {size}"


def _committed(progress: Json) -> str:
    if progress["commit_pause_s"] is None:
        return "under way" if progress["phase"] == "commit" else "pause not reported"
    drain = "" if progress["drain_s"] is None else f" (drain {format_duration(progress['drain_s'])})"
    epoch = "" if progress["epoch"] is None else f", epoch {progress['epoch']}"
    return f"pause {format_duration(progress['commit_pause_s'])}{drain}{epoch}"
