"""Memory that a neighbour takes 64 MiB a look, up to nothing left, and gives back: GPUs, by NVML's stand-in."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.support.fake_nvml import library
from tests.support.lone_flexctl import ROOT

pytestmark = pytest.mark.real_loop
UUIDS = [f"GPU-{i * 0x1111:08x}-0000-0000-0000-{i:012}" for i in range(4)]
FREE_MIB = 80 * 1024 - 512 - 2  # of a GPU with nobody on it
KEEP_FREE_MIB, STEP_MIB = 512, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What was told when neighbours held so much, and how it was afterwards."""

    held_mib: int
    change: str
    message: str
    devices: list[str]
    blocks: int


@pytest.fixture(scope="module")
def stories() -> dict[str, list[Told]]:
    """What the daemon's watch tells while neighbours on one GPU, or on all, take all of it, and leave."""
    environment = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": str(library())}
    command = [sys.executable, "-m", "tests.support.neighbour_steps"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("held_mib", "change", "message", "devices", "blocks")
    found = json.loads(done.stdout.splitlines()[-1])  # before it are the lines of the log
    return {name: [Told(**dict(zip(names, each, strict=True))) for each in told] for name, told in found.items()}


def test_layers_leave_the_gpu_that_fills_in_time_in_one_move_and_go_nowhere_when_it_is_free_again(
    stories: dict[str, list[Told]],
) -> None:
    [told] = stories["one"]
    assert (told.change, len(told.devices)) == ("move", 2)
    assert set(told.devices) < set(UUIDS[1:])
    assert f"MiB are free on {UUIDS[0]}, where 512 MiB are to stay free" in told.message
    short_since_mib = FREE_MIB - KEEP_FREE_MIB
    assert short_since_mib <= told.held_mib <= short_since_mib + 7 * STEP_MIB  # ten seconds later, and some is left


def test_where_every_gpu_fills_nothing_moves_and_that_is_told_once_with_what_is_free_on_each(
    stories: dict[str, list[Told]],
) -> None:
    [told] = stories["all"]
    assert (told.change, told.devices) == ("short", UUIDS[:2])
    assert "layers cannot move, as no other device has more than 1 GiB free: " in told.message
    assert all(f"MiB on {uuid}" in told.message for uuid in UUIDS[1:])
    assert told.held_mib < FREE_MIB


def test_a_kv_cache_that_can_shrink_follows_step_by_step_before_layers_move_and_comes_back_whole(
    stories: dict[str, list[Told]],
) -> None:
    found = stories["all, resizing"]
    kinds = [told.change for told in found]
    assert kinds == ["shrink"] * kinds.count("shrink") + ["short"] + ["grow"] * kinds.count("grow")
    assert kinds.count("shrink") < 30
    assert kinds.count("grow") < 10
    assert (min(told.blocks for told in found), found[-1].blocks) == (33, 4096)
    for told in found:  # 512 KiB of a KV block on each of the two
        if told.change == "shrink" and told.blocks > 33:
            assert told.blocks / 2 <= FREE_MIB - told.held_mib - KEEP_FREE_MIB
