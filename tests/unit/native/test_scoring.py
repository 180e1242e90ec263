"""Log-probabilities of the likeliest tokens and of prompts, against a plain log-softmax."""

import numpy as np
import pytest
import torch

from engines.native.details import details_of
from engines.native.messages import Scored, StepDone, Top
from engines.native.scoring import score, tops_of

VOCABULARY, HIDDEN = 90, 8
HEAD = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(1))


def done(**what: object) -> StepDone:
    return StepDone(worker=0, step_id=1, generation=1, tokens=b"", logprobs=b"", **what)  # type: ignore[arg-type]


def test_the_likeliest_tokens_of_a_row() -> None:
    row = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(2))
    expected = row.log_softmax(dim=-1)
    details = details_of(done(tops=[tops_of(row, Top(row=3, count=5))]))
    assert details is not None
    assert [token for token, _ in details.tops[3]] == expected.topk(5).indices.tolist()
    assert [value for _, value in details.tops[3]] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_prompts_are_scored_in_pieces_as_in_one(count: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    expected = (hidden @ HEAD).log_softmax(dim=-1)
    asked = Scored(entry=2, skipped=0, targets=targets.int().numpy().tobytes(), count=count)
    details = details_of(done(scores=[score(lambda each: each @ HEAD, hidden, asked)]))
    assert details is not None
    scores = details.scores[2]
    own = expected.gather(1, targets.view(-1, 1))
    assert [each.token_id for each in scores] == targets.tolist()
    assert [each.logprob for each in scores] == pytest.approx(own.view(-1).tolist(), abs=1e-5)
    assert [each.rank for each in scores] == (1 + (expected > own).sum(dim=-1)).tolist()
    assert {len(each.top) for each in scores} == {count}
    best = np.array([[token for token, _ in each.top] for each in scores])
    assert np.array_equal(best, expected.topk(count).indices.numpy())


def test_a_step_without_them_has_no_details() -> None:
    assert details_of(done()) is None
