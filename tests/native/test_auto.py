"""The daemon adapts by itself, with the native engine: a burst makes it change the layout where the profile says so.

The profile is given: one stage of two threads serves about 8 of these requests a second, two stages about 12.
"""

import json
from pathlib import Path

import pytest

from tests.support.bursts import AUTO, PROMPT, TOKENS, check_decisions, decisions_of, keep_profile, there_and_back
from tests.support.daemon import started, write_config

pytestmark = [pytest.mark.engine, pytest.mark.real_loop]

CONFIG = f"devices.cpu_count = 2\nengines.native.threads = 2\n{AUTO}"
TOKEN_S = {1: 1.4e-3, 2: 1e-3}


def write_burst(path: Path) -> int:
    """Write a trace of 2 requests/s with a burst of 11/s from second 4 to 24; return how many requests it has."""
    calm, burst, after = (
        (4 * i / 8 for i in range(8)),
        (4 + i / 11 for i in range(220)),
        (24 + i / 2 for i in range(60)),
    )
    arrivals_s = [*calm, *burst, *after]
    wire = ({"timestamp": 1e3 * at_s, "input_length": len(PROMPT), "output_length": TOKENS} for at_s in arrivals_s)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in wire))
    return len(arrivals_s)


@pytest.mark.long
async def test_a_burst_that_flexctl_bench_replays_changes_the_layout_and_no_request_fails(tmp_path: Path) -> None:
    config = write_config(tmp_path, engine="native", stages=1, more=CONFIG)
    keep_profile(config, tmp_path / "state", cores=2, token_s=TOKEN_S)
    count = write_burst(tmp_path / "burst.jsonl")
    async with started(tmp_path, ready=True, engine="native", stages=1, more=CONFIG) as daemon:
        code, out, err = await daemon.flexctl("bench", "--trace", str(tmp_path / "burst.jsonl"), "--json")
        assert code == 0, out + err
        found = json.loads(out)
        assert (found["requests"], found["failed"], found["failures"]) == (count, 0, {})
        check_decisions(await decisions_of(daemon), fewer=1, more=2, begins_with=1)


async def test_a_burst_changes_the_layout_and_calm_changes_it_back(tmp_path: Path) -> None:
    config = write_config(tmp_path, engine="native", stages=1, more=CONFIG)
    keep_profile(config, tmp_path / "state", cores=2, token_s=TOKEN_S)
    async with started(tmp_path, ready=True, engine="native", stages=1, more=CONFIG) as daemon:
        decisions = await there_and_back(daemon, fewer=1, more=2, within_s=90)
        check_decisions(decisions, fewer=1, more=2, begins_with=1)
        code, out, _err = await daemon.flexctl("auto", "off")
        assert (code, out.strip()) == (0, "auto off: nothing changes by itself")
        assert (await daemon.ask("/status"))["auto"]["mode"] == "off"
