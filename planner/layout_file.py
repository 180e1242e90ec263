"""Layouts as JSON, as ``flexctl rebalance --layout FILE`` reads them. Text in, pipeline out: no file is opened here.

::

    {"stages": [{"devices": ["cpu:0"], "decoders": [0, 4]},
                {"devices": ["cpu:1"], "decoders": [4, 8]}]}

``decoders`` is half-open: the first decoder of the stage, and the one after its last.
"""

import json

from planner.errors import InvalidLayout
from planner.layout import Pipeline, Stage


def parse_layout(text: str | bytes) -> Pipeline:
    """Return the pipeline that a layout file describes.

    Raises:
        InvalidLayout: Not JSON, a key is missing, unknown or of another type, or no engine could run such a pipeline;
            the message says where.
    """
    try:
        value = json.loads(text)
    except ValueError as error:  # JSON or UTF-8
        raise InvalidLayout(f"not valid JSON: {error}") from error
    return read_layout(value)


def read_layout(value: object) -> Pipeline:
    """Return the pipeline that a layout, parsed from JSON, describes. Raises as ``parse_layout``."""
    stages = _object(value, "the layout", keys=("stages",))["stages"]
    if not isinstance(stages, list) or not stages:
        raise InvalidLayout("stages: must be a list of at least one stage")
    return Pipeline(stages=tuple(_stage(stage, f"stages[{index}]") for index, stage in enumerate(stages)))


def write_layout(pipeline: Pipeline) -> dict[str, object]:
    """Return a pipeline as ``read_layout`` reads it, ready for JSON."""
    return {"stages": _stages(pipeline)}


def format_layout(pipeline: Pipeline) -> str:
    """Return a pipeline as the text of a layout file, one line per stage."""
    lines = [json.dumps(stage) for stage in _stages(pipeline)]
    return '{"stages": [\n  ' + ",\n  ".join(lines) + "\n]}\n"


def _stages(pipeline: Pipeline) -> list[dict[str, object]]:
    return [
        {"devices": list(stage.device_ids), "decoders": [stage.first_decoder, stage.end_decoder]}
        for stage in pipeline.stages
    ]


def _stage(value: object, where: str) -> Stage:
    stage = _object(value, where, keys=("devices", "decoders"))
    named = stage["devices"]
    devices = [device for device in named if isinstance(device, str) and device] if isinstance(named, list) else []
    if not devices or devices != named:
        raise InvalidLayout(f'{where}.devices: must be a list of device ids, such as ["cpu:0"]')
    match stage["decoders"]:
        case [int(first), int(end)] if not isinstance(first, bool) and not isinstance(end, bool):
            pass
        case _:
            raise InvalidLayout(f"{where}.decoders: must be two whole numbers, such as [0, 4] for decoders 0 to 3")
    if first >= end:
        raise InvalidLayout(f"{where}.decoders: [{first}, {end}] is empty: the second number is one past the last")
    return Stage(device_ids=tuple(devices), first_decoder=first, end_decoder=end)


def _object(value: object, where: str, *, keys: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidLayout(f"{where}: must be an object with {_quoted(keys)}")
    missing = [key for key in keys if key not in value]
    if missing:
        raise InvalidLayout(f"{where}: {_quoted(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    unknown = [str(key) for key in value if key not in keys]
    if unknown:
        raise InvalidLayout(f"{where}: unknown key {_quoted(unknown[:1])}; the keys are {_quoted(keys)}")
    return value


def _quoted(keys: tuple[str, ...] | list[str]) -> str:
    return " and ".join(f'"{key}"' for key in keys)
