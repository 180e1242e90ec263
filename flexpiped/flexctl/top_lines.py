"""What ``flexctl top`` draws besides the status: which layers lie where, as bars over the model. Pure functions."""

from collections.abc import Mapping
from typing import Any, Final

from flexpiped.flexctl.text import bar, plural
from topology.units import format_bytes

_MAP_WIDTH: Final = 40
_BAR_WIDTH: Final = 10


def stage_map(status: Mapping[str, Any]) -> list[str]:
    """Return a line per stage: its layers at their place in the model, how busy it is, and its memory as a share."""
    stages = status["stages"]
    if not stages:
        return ["no stage: " + (status["reason"] or "there is no engine")]
    decoders = max(stage["end_decoder"] for stage in stages)
    most_bytes = max(_held_bytes(stage) for stage in stages)
    width = max(len(_devices(stage)) for stage in stages)
    return [
        f"{stage['index']:>2}  {_devices(stage):<{width}}  [{_span(stage, decoders)}]  "
        f"busy {_busy(stage)}  memory {bar(_held_bytes(stage), most_bytes, width=_BAR_WIDTH)} "
        f"{format_bytes(_held_bytes(stage))}"
        for stage in stages
    ]


def change_line(status: Mapping[str, Any]) -> str:
    """Return what of the layout is changing, or may be asked for."""
    if status["under_way"]:
        return f"now   {status['under_way']}"
    return f"no change under way, {plural(len(status['stages']), 'stage')}"


def _devices(stage: Mapping[str, Any]) -> str:
    return "+".join(stage["device_ids"])


def _held_bytes(stage: Mapping[str, Any]) -> int:
    return int(stage["weights_bytes"] + stage["kv_mapped_bytes"])


def _busy(stage: Mapping[str, Any]) -> str:
    busy = stage["busy"]
    if busy is None:
        return f"{'not reported':<{_BAR_WIDTH + 6}}"
    return f"{bar(busy, 1.0, width=_BAR_WIDTH)} {busy * 100:3.0f} %"


def _span(stage: Mapping[str, Any], decoders: int) -> str:
    """Return the model as a line, with the decoders of this stage filled. An empty stage is an empty line."""
    first: int = stage["first_decoder"] * _MAP_WIDTH // max(decoders, 1)
    end: int = stage["end_decoder"] * _MAP_WIDTH // max(decoders, 1)
    if stage["end_decoder"] > stage["first_decoder"]:
        end = max(end, first + 1)
    return "." * first + "#" * (end - first) + "." * (_MAP_WIDTH - end)
