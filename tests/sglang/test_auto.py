"""The daemon adapts by itself, with SGLang: a burst moves layers to ranks that had none, and calm moves them back."""

from pathlib import Path

import pytest

from flexpiped.models import demo_model_places
from tests.support.bursts import AUTO, changes_on_ranks_that_stay
from tests.support.checkpoints import make_untied
from tests.support.sglang import interpreter

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.real_loop, pytest.mark.long]


async def test_a_burst_changes_the_layout_of_sglang_and_calm_changes_it_back(tmp_path: Path) -> None:
    model = make_untied(tmp_path / "untied", of=demo_model_places()[0])  # of a tied head it makes no several ranks
    own = f'[engines.sglang]\npython = "{interpreter()}"\nthreads = 4\n'
    more = f'model = "{model}"\nmax_model_len = 2048\n{AUTO}{own}'
    await changes_on_ranks_that_stay(tmp_path, engine="sglang", ranks=4, more=more)
