"""What is chosen and not measured is configuration: every constant of policy and neighbourhood has a key."""

from dataclasses import fields

import pytest

from flexpiped import auto, neighbourhood
from flexpiped.config_file import parse_config
from flexpiped.settings import AutoSettings, DeviceSettings
from flexpiped.settings_keys import KEYS
from planner.granularity import ScoreConstants
from planner.neighbourhood import NeighbourConstants
from planner.policy_state import PolicyConstants
from planner.scaling import ScaleConstants
from topology.units import MIB

PATHS = {key.path for key in KEYS}
CHANGED = """
[devices]
keep_free = "1 MiB"
slack = 0.2
grow_after_s = 3.0
move_after_s = 4.0
move_again_s = 5.0
[auto]
add_again_s = 6.0
queue_beta = 1.0
queue_gamma = 2.0
queue_full = 3.0
due_share = 0.5
held_weight = 4.0
held_fades_per_s = 5.0
free_weight = 6.0
"""


@pytest.mark.parametrize(
    ("section", "kind"),
    [
        ("auto", PolicyConstants),
        ("auto", ScoreConstants),
        ("auto", ScaleConstants),
        ("devices", NeighbourConstants),
    ],
)
def test_every_constant_has_a_key(section: str, kind: type) -> None:
    names = {each.name for each in fields(kind)} - {"score", "scale"}  # constants themselves
    assert {name for name in names if (section, name) not in PATHS} == set()


def test_the_defaults_of_the_keys_are_those_of_the_constants() -> None:
    assert auto.constants_of(AutoSettings()) == PolicyConstants()
    assert neighbourhood.constants_of(DeviceSettings()) == NeighbourConstants(keep_free_bytes=512 * MIB)


def test_what_is_configured_counts() -> None:
    settings = parse_config(CHANGED, file="flexpiped.toml")
    assert neighbourhood.constants_of(settings.devices) == NeighbourConstants(
        keep_free_bytes=MIB, slack=0.2, grow_after_s=3.0, move_after_s=4.0, move_again_s=5.0
    )
    assert auto.constants_of(settings.auto) == PolicyConstants(
        add_again_s=6.0,
        scale=ScaleConstants(
            beta=1.0,
            gamma=2.0,
            queue_full=3.0,
            due_share=0.5,
            held_weight=4.0,
            held_fades_per_s=5.0,
            free_weight=6.0,
        ),
    )
