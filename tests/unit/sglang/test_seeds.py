"""What SGLang may draw of a request, by our part inside it."""

import sys

import torch

from engines.sglang.command import PLUGIN

sys.path += [str(PLUGIN)]  # as SGLang's interpreter has it

from flexpiped_sglang.seeds import filtered, seed_of

PROBS = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
ALL = 1 << 30


def kept(*, top_k: int = ALL, top_p: float = 1.0, min_p: float | None = None) -> list[int]:
    """Return the tokens that can still be drawn; their probabilities stand where they stood."""
    left = filtered(
        PROBS.clone(),
        torch.tensor([top_k]),
        torch.tensor([top_p]),
        None if min_p is None else torch.tensor([min_p]),
    )
    tokens = left[0].nonzero().view(-1)
    assert torch.equal(left[0, tokens], PROBS[0, tokens])
    return list(tokens.tolist())


def test_what_is_too_unlikely_is_not_drawn() -> None:
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.6) == [1, 3]  # the token that crosses the bound is the last
    assert kept(min_p=0.4) == [1, 3]
    assert kept(top_k=3, min_p=0.6) == [1]


def test_a_request_without_a_seed_has_one_of_its_own_on_every_rank() -> None:
    assert seed_of(0, request_id="a") == seed_of(0, request_id="b") == 0
    assert seed_of(None, request_id="a") == seed_of(None, request_id="a") != seed_of(None, request_id="b")
