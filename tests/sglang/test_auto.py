"""The daemon adapts by itself, with real SGLang: a burst moves layers to ranks that had none, and calm moves them back.

The profile is given: two stages of two threads serve about 8 of these requests a second, four stages about 12.
"""

from pathlib import Path

import pytest

from flexpiped.models import demo_model_places
from tests.engines.install_sglang import SGLANG
from tests.engines.interpreter import ensure_there
from tests.support.bursts import AUTO, check_decisions, keep_profile, there_and_back
from tests.support.checkpoints import make_untied
from tests.support.daemon import started, write_config

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]

RANKS = 4


async def test_a_burst_changes_the_layout_of_sglang_and_calm_changes_it_back(tmp_path: Path) -> None:
    model = make_untied(tmp_path / "untied", of=demo_model_places()[0])  # of a tied head it makes no several ranks
    own = f'[engines.sglang]\npython = "{ensure_there(SGLANG)}"\nthreads = {RANKS}\n'
    more = f'model = "{model}"\ndtype = "float32"\nmax_model_len = 2048\ndevices.cpu_count = {RANKS}\n{AUTO}{own}'
    config = write_config(tmp_path, engine="sglang", stages=RANKS, more=more)
    keep_profile(config, tmp_path / "state", cores=RANKS, token_s={1: 2.8e-3, 2: 2e-3})
    async with started(tmp_path, ready=True, engine="sglang", stages=RANKS, more=more) as daemon:
        before = await daemon.ask("/status")
        assert len(before["stages"]) == RANKS
        decisions = await there_and_back(daemon, fewer=2, more=RANKS, within_s=180)
        check_decisions(decisions, fewer=2, more=RANKS, begins_with=RANKS)
        assert (await daemon.ask("/status"))["epoch"] == before["epoch"] + 3
