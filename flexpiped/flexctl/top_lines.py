"""What ``flexctl top`` draws besides the status: which layers lie where, as bars over the model; how far a change is.

Pure functions.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

from flexpiped.flexctl.rebalance_lines import View, advance, current_line, is_by_replica, is_scaling
from flexpiped.flexctl.text import bar
from flexpiped.flexctl.topology_lines import link_name, rate
from topology.errors import UnknownDevice
from topology.topology import Topology
from topology.units import format_bytes, plural

_MAP_WIDTH: Final = 32  # with the link to the next stage, a row fits 120 columns
_BAR_WIDTH: Final = 10


def stage_map(status: Mapping[str, Any], topology: Topology | None = None) -> list[str]:
    """Return a line per stage: its layers at their place in the model, how busy it is, its memory as a share, and what
    joins it to the next one, where ``topology`` knows that."""
    stages = status["stages"]
    if not stages:
        return ["no stage: " + (status["reason"] or "there is no engine")]
    decoders = max(stage["end_decoder"] for stage in stages)
    most_bytes = max(_held_bytes(stage) for stage in stages)
    width = max(len(_devices(stage)) for stage in stages)
    links = [*(_link(stage, after, topology) for stage, after in pairwise(stages)), ""]
    return [
        f"{stage['index']:>2}  {_devices(stage):<{width}}  [{_span(stage, decoders)}]  "
        f"busy {_busy(stage)}  memory {bar(_held_bytes(stage), most_bytes, width=_BAR_WIDTH)} "
        f"{format_bytes(_held_bytes(stage))}{link}"
        for stage, link in zip(stages, links, strict=True)
    ]


def change_lines(status: Mapping[str, Any], view: View) -> list[str]:
    """Return what of the layout is changing, with the phase that it is in as ``flexctl rebalance`` draws it."""
    if not status["under_way"]:
        return [f"no change under way, {plural(len(status['stages']), 'stage')}"]
    drawn = current_line(view)
    return [f"now   {status['under_way']}", *([f"      {drawn}"] if drawn else [])]


def follow(view: View, fields: Mapping[str, Any]) -> View:
    """Return how far the change is after an event, whose ``fields`` may be of something else."""
    match fields.get("state"):
        case "plan":
            return View(by_replica=is_by_replica(fields) or is_scaling(fields))
        case "progress":
            return advance(view, fields["progress"])[0]
        case "ended":
            return View()
        case _:
            return view


def _devices(stage: Mapping[str, Any]) -> str:
    return "+".join(stage["device_ids"])


def _held_bytes(stage: Mapping[str, Any]) -> int:
    return int(stage["weights_bytes"] + stage["kv_mapped_bytes"])


def _busy(stage: Mapping[str, Any]) -> str:
    busy = stage["busy"]
    if busy is None:
        return f"{'not reported':<{_BAR_WIDTH + 6}}"
    return f"{bar(busy, 1.0, width=_BAR_WIDTH)} {busy * 100:3.0f} %"


def _link(stage: Mapping[str, Any], after: Mapping[str, Any], topology: Topology | None) -> str:
    """Return what joins a stage to the one after it; a rate that nobody has measured bears a ``~``."""
    a_id, b_id = stage["device_ids"][-1], after["device_ids"][0]
    if a_id == b_id:
        return "  -> same device"
    if topology is None:
        return ""
    try:
        link = topology.link(a_id, b_id)
    except UnknownDevice:
        return ""
    return f"  -> {link_name(link)} {'' if link.is_measured else '~'}{rate(link.bandwidth_bytes_per_s)} GB/s"


def _span(stage: Mapping[str, Any], decoders: int) -> str:
    """Return the model as a line, with the decoders of this stage filled. An empty stage is an empty line."""
    first: int = stage["first_decoder"] * _MAP_WIDTH // max(decoders, 1)
    end: int = stage["end_decoder"] * _MAP_WIDTH // max(decoders, 1)
    if stage["end_decoder"] > stage["first_decoder"]:
        end = max(end, first + 1)
    return "." * first + "#" * (end - first) + "." * (_MAP_WIDTH - end)
