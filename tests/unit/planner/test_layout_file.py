"""Layout files: what they may say, and where they are wrong."""

import pytest

from planner.errors import InvalidLayout
from planner.layout import Pipeline, Stage, pipeline_of
from planner.layout_file import format_layout, parse_layout, read_layout, write_layout

TEXT = """{"stages": [
  {"devices": ["cpu:0"], "decoders": [0, 4]},
  {"devices": ["cpu:2"], "decoders": [4, 8]}
]}
"""
PIPELINE = pipeline_of(device_ids=["cpu:0", "cpu:2"], cuts=[4], num_decoders=8)


def test_a_layout_file_is_a_pipeline_and_back() -> None:
    assert parse_layout(TEXT) == PIPELINE
    assert parse_layout(TEXT.encode()) == PIPELINE
    assert format_layout(PIPELINE) == TEXT
    assert read_layout(write_layout(PIPELINE)) == PIPELINE


def test_a_stage_may_name_a_device_group() -> None:
    pipeline = parse_layout('{"stages": [{"devices": ["GPU-1", "GPU-2"], "decoders": [0, 4]}]}')
    assert pipeline == Pipeline(stages=(Stage(device_ids=("GPU-1", "GPU-2"), first_decoder=0, end_decoder=4),))


def stage(devices: str = '["cpu:0"]', decoders: str = "[0, 4]", more: str = "") -> str:
    return f'{{"stages": [{{"devices": {devices}, "decoders": {decoders}{more}}}]}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stages": [', r"not valid JSON: .*line 1 column"),
        (b"\xff", r"not valid JSON"),
        ("[]", r'the layout: must be an object with "stages"'),
        ("{}", r'the layout: "stages" is missing'),
        ('{"stages": []}', r"stages: must be a list of at least one stage"),
        ('{"stages": {}}', r"stages: must be a list"),
        ('{"stages": [3]}', r'stages\[0\]: must be an object with "devices" and "decoders"'),
        ('{"stages": [{}]}', r'stages\[0\]: "devices" and "decoders" are missing'),
        (stage(more=', "layers": 3'), r'stages\[0\]: unknown key "layers"; the keys are "devices" and "decoders"'),
        (stage(devices="[]"), r"stages\[0\].devices: must be a list of device ids"),
        (stage(devices='"cpu:0"'), r"stages\[0\].devices: must be a list of device ids"),
        (stage(devices='["cpu:0", 1]'), r"stages\[0\].devices: must be a list of device ids"),
        (stage(decoders="[0]"), r"stages\[0\].decoders: must be two whole numbers"),
        (stage(decoders="[0, 4.5]"), r"stages\[0\].decoders: must be two whole numbers"),
        (stage(decoders="[false, true]"), r"stages\[0\].decoders: must be two whole numbers"),
        (stage(decoders="[4, 4]"), r"stages\[0\].decoders: \[4, 4\] is empty"),
        (stage(decoders="[1, 4]"), r"stage 0 holds decoders 1 to 3, but must begin at decoder 0"),
        (TEXT.replace("cpu:2", "cpu:0"), r"stage 1: two stages of one model never share a device \(cpu:0\)$"),
        (stage(devices='["cpu:0", "cpu:0"]'), r"stage 0 names a device twice"),
        (TEXT.replace("[4, 8]", "[5, 8]"), r"stage 1 holds decoders 5 to 7, but must begin at decoder 4"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidLayout, match=message):
        parse_layout(text)
