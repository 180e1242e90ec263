"""``flexctl plan``: from a plan as JSON values to lines for people, 80 columns wide. Pure functions."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from flexpiped.flexctl.text import NO_BREAK, PLAIN, Colour, Paint, format_duration, format_latency, table, wrapped
from topology.units import format_bytes, format_bytes_of, plural

Json = Mapping[str, Any]

_INDENT: Final = " " * 8
_UUID: Final = re.compile(r"(GPU|MIG)-[0-9a-f]{8}-")
_VERDICT_COLOURS: Final = {"chosen": Colour.GREEN, "infeasible": Colour.RED, "timeout": Colour.RED}


def plan_lines(answer: Json, *, explain: bool, paint: Paint = PLAIN) -> list[str]:
    """Return the answer first, then what it rests on; with ``explain`` every candidate and why it lost."""
    lines = list(_answer_lines(answer, paint))
    if explain:
        lines += _candidates_lines(answer["candidates"], paint)
        lines += wrapped(_starts(answer["starts"]), head="start     ") if answer.get("starts") else []
    lines += wrapped(f"{_workload(answer['workload'])}; {_targets(answer['slo'])}", head="workload  ")
    lines += wrapped(answer["times_from"], head="times     ")
    return lines


def _answer_lines(answer: Json, paint: Paint) -> Iterator[str]:
    chosen = next((each for each in answer["candidates"] if each["verdict"] == "chosen"), None)
    if chosen is None:
        word = "infeasible" if answer["state"] == "infeasible" else "timeout"
        first, *rest = wrapped(answer["reason"], head=f"{word}: ")
        yield paint(word, Colour.RED) + first.removeprefix(word)
        yield from rest
        return
    found = chosen["found"]
    proof = "optimal" if found["optimal"] else f"slowest stage within {found['gap'] * 100:.2g} % of the best"
    where = f"{label(chosen)} on {_places(found)} ({proof}, {format_duration(answer['took_s'])})"
    first, *rest = wrapped(where, head="chosen  ")
    yield paint("chosen", Colour.GREEN) + first.removeprefix("chosen")
    yield from rest
    yield from wrapped(answer["reason"], head=_INDENT)
    yield _INDENT + "   ".join(_predicted(found))
    yield _INDENT + _cuts(found)
    yield from _stage_lines(found)


def label(candidate: Json) -> str:
    """Return a candidate by its name: ``2 stages``, ``3 x 4 stages of 2 GPUs each``."""
    text = plural(candidate["num_stages"], "stage")
    if candidate["degree"] > 1:
        text += f" of {candidate['degree']} devices each"
    replicas = len(candidate["found"]["pipelines"]) if candidate["found"] else 1
    return f"{replicas} x {text}" if replicas > 1 else text


def _places(found: Json) -> str:
    return "; ".join(", ".join(device_names(pipeline)) for pipeline in found["pipelines"])


def device_names(pipeline: Sequence[Json]) -> list[str]:
    """Return the devices of a pipeline, runs of numbered ones drawn together: ``cpu:0-3``."""
    names = [group_name(stage["device_ids"]) for stage in pipeline]

    def run(numbered: tuple[int, str]) -> tuple[str, int | str]:
        position, name = numbered
        head, colon, number = name.rpartition(":")
        return (head, int(number) - position) if colon and number.isdecimal() else (name, name)

    found = []
    for _, group in groupby(enumerate(names), key=run):
        members = [name for _, name in group]
        last = members[-1].rpartition(":")[2]
        found.append(members[0] if len(members) == 1 else f"{members[0]}-{last}")
    return found


def group_name(device_ids: Sequence[str]) -> str:
    """Return a device group by its first device: of a UUID the part by which people tell them apart; ``.. +3``."""
    first = device_ids[0] if not _UUID.match(device_ids[0]) else device_ids[0][:12]
    return first if len(device_ids) == 1 else f"{first} +{len(device_ids) - 1}"


def _predicted(found: Json) -> list[str]:
    predicted = found["prediction"]
    return [
        f"TTFT {_latency(predicted['ttft_s'])}",
        f"TPOT {_latency(predicted['tpot_s'])}",
        f"{predicted['capacity_tokens_per_s']:,.0f} tok/s at most",
        f"KV {found['kv_tokens']:,} tokens",
    ]


def _cuts(found: Json) -> str:
    loss = found["nested_loss"]
    if loss is None:
        return "cuts: free; no nested ones for this number of stages"
    if found["nested"]:
        return f"cuts: nested in those of finer granularities, {loss * 100:.1f} % slower than free"
    return f"cuts: free; nested ones would be {loss * 100:.1f} % slower or move more"


def _stage_lines(found: Json) -> list[str]:
    """Return what each stage of the first pipeline holds, and what of its device it takes."""
    rows = [("stage", "device", "decoders", "needs", "weights", "KV", "workspace")]
    for index, (stage, memory) in enumerate(zip(found["pipelines"][0], found["memory"], strict=True)):
        first, last = stage["first_decoder"], stage["end_decoder"] - 1
        rows.append(
            (
                str(index),
                group_name(stage["device_ids"]),
                str(first) if first == last else f"{first}-{last}" if first < last else "none",
                format_bytes_of(memory["needed_bytes"], memory["usable_bytes"]),
                format_bytes(memory["weight_bytes"]),
                _kv(memory),
                format_bytes(memory["workspace_bytes"]),
            )
        )
    return table(rows, gap="  ")


def _kv(memory: Json) -> str:
    budget = memory.get("kv_budget_bytes")
    return format_bytes(memory["kv_bytes"]) if budget is None else format_bytes_of(memory["kv_bytes"], budget)


def _candidates_lines(candidates: Sequence[Json], paint: Paint) -> list[str]:
    header = ("", "stages", "TTFT", "TPOT", "tok/s", "in time/s", "KV tokens", "best CV", "fullest")
    rows = [header] + [_row(candidate) for candidate in candidates]
    lines = [plural(len(candidates), "candidate")]
    title, *drawn = table(rows, indent="", gap="  ")
    lines.append(title)
    for candidate, line in zip(candidates, drawn, strict=True):
        lines.append(line)
        lines += _memory_lines(candidate["found"]) if candidate["found"] else []
        if candidate["verdict"] != "chosen":
            word = "" if candidate["verdict"] == "lost" else f"{candidate['verdict']}: "
            painted = paint(word, _VERDICT_COLOURS[candidate["verdict"]]) if word else ""
            first, *rest = wrapped(word + candidate["reason"], head=_INDENT)
            lines += [_INDENT + painted + first.removeprefix(_INDENT + word), *rest]
    return lines


def _memory_lines(found: Json) -> list[str]:
    """Return what the first pipeline takes of each device, in their order, devices that are alike drawn together."""
    stages = [
        (stage, format_bytes_of(memory["needed_bytes"], memory["usable_bytes"]))
        for stage, memory in zip(found["pipelines"][0], found["memory"], strict=True)
    ]
    alike: dict[str, list[Json]] = {}
    for stage, text in sorted(stages, key=lambda pair: _in_order(pair[0]["device_ids"][0])):
        alike.setdefault(text, []).append(stage)
    parts = [f"{', '.join(device_names(held))}:{NO_BREAK}{text.replace(' ', NO_BREAK)}" for text, held in alike.items()]
    return wrapped("; ".join(parts), head=f"{_INDENT}memory ")


def _in_order(device_id: str) -> tuple[str, int]:
    head, _, number = device_id.rpartition(":")
    return (head, int(number)) if number.isdecimal() else (device_id, 0)


def _row(candidate: Json) -> tuple[str, ...]:
    mark = "*" if candidate["verdict"] == "chosen" else ""
    found = candidate["found"]
    if found is None:
        return (mark, _short_label(candidate), *("-" for _ in range(7)))
    predicted = found["prediction"]
    fullest = max(found["memory"], key=lambda memory: memory["needed_bytes"] / max(1, memory["usable_bytes"]))
    return (
        mark,
        _short_label(candidate),
        _latency(predicted["ttft_s"]),
        _latency(predicted["tpot_s"]),
        f"{predicted['capacity_tokens_per_s']:,.0f}",
        f"{predicted['goodput_per_s']:.3g}",
        f"{found['kv_tokens']:,}",
        "-" if found["best_cv"] is None else f"{found['best_cv']:g}",
        f"{fullest['needed_bytes'] / max(1, fullest['usable_bytes']) * 100:.0f} %",
    )


def _short_label(candidate: Json) -> str:
    text = str(candidate["num_stages"])
    if candidate["degree"] > 1:
        text += f" (TP {candidate['degree']})"
    replicas = len(candidate["found"]["pipelines"]) if candidate["found"] else 1
    return f"{replicas} x {text}" if replicas > 1 else text


def _latency(value: float | None) -> str:
    return "never" if value is None else format_latency(value)


def _starts(starts: Json) -> str:
    """Return what is kept of the parameters, and what a new replica takes with that, and without."""
    kept = f"{starts['kept_share']:.0%} of the parameters are kept in host memory"
    if starts["origin"] == "page cache":
        kept += ", the files are in the page cache"
    each_one = [
        f"{format_duration(each['now_s'])} with {plural(each['num_stages'], 'stage')}"
        + ("" if each["cold_s"] is None else f" ({format_duration(each['cold_s'])} from storage)")
        for each in starts["expected"]
    ]
    return f"{kept}; a new replica serves after {', '.join(each_one)}" if each_one else f"{kept}; no start was measured"


def _workload(workload: Json) -> str:
    return (
        f"{workload['rate_per_s']:g} requests/s, CV {workload['cv']:g}, "
        f"{workload['prompt_tokens_mean']:g} tokens in, {workload['output_tokens_mean']:g} out"
    )


def _targets(slo: Json) -> str:
    named = [f"{name} {format_latency(slo[key])}" for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s")) if slo[key]]
    return f"targets: {', '.join(named)}" if named else "no targets for TTFT and TPOT"
