"""Choosing the next token: greedy, cut to top_k and top_p, and drawn alike wherever the row stands."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from engines.native.messages import Draw
from engines.native.sampling import chosen_logprobs, gumbel_noise, keep_mask, sample

VOCABULARY = 50


def random_logits(rows: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def draw(
    *, row: int = 0, seed: int = 1, position: int = 0, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Draw:
    return Draw(row=row, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, position=position)


def kept_by_brute_force(scaled: list[float], *, top_k: int, top_p: float) -> set[int]:
    """Return the ``top_k`` most likely tokens, of these the smallest set that has ``top_p`` of their mass."""
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])
    order = order[:top_k] if top_k else order
    weights = np.exp(np.array([scaled[token] for token in order]) - scaled[order[0]])
    weights /= weights.sum()
    kept, mass = set[int](), 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.add(token)
        mass += weight
        if mass >= top_p:
            break
    return kept


def tokens_of(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().view(-1).tolist())


def test_without_draws_every_row_is_greedy() -> None:
    logits = random_logits(6)
    assert torch.equal(sample(logits, []), logits.argmax(dim=-1))


def test_only_drawn_rows_are_drawn() -> None:
    logits = random_logits(4)
    tokens = sample(logits, [draw(row=2, temperature=50.0, seed=5)])
    greedy = logits.argmax(dim=-1)
    assert tokens[[0, 1, 3]].tolist() == greedy[[0, 1, 3]].tolist()
    assert tokens[2] != greedy[2]


@pytest.mark.parametrize("temperature", [1e-5, 1e-300, 1e-308, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.5}], ids=str)
def test_the_least_temperatures_draw_the_likeliest(temperature: float, cut: dict[str, Any]) -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, -torch.inf]])
    asked = Draw(row=0, seed=1, position=0, temperature=temperature, **({"top_p": 1.0, "top_k": 0} | cut))
    assert sample(logits, [asked]).tolist() == [1]


@pytest.mark.parametrize("seed", range(40))
def test_masks_equal_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    top_k, top_p = rng.choice([0, 1, 2, 7, 49, 50, 90]), rng.choice([1.0, 0.99, 0.9, 0.5, 0.1, 0.0])
    scaled = random_logits(1, seed=seed)[0].double()
    expected = kept_by_brute_force(scaled.tolist(), top_k=top_k, top_p=top_p)
    assert tokens_of(keep_mask(scaled, top_k=top_k, top_p=top_p)) == expected


def test_equal_logits_are_kept_or_dropped_together() -> None:
    scaled = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    assert tokens_of(keep_mask(scaled, top_k=2, top_p=1.0)) == {1, 2, 3}
    assert tokens_of(keep_mask(scaled, top_k=0, top_p=0.7)) == {1, 2, 3}


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}])
def test_the_narrowest_cut_is_greedy(cut: dict[str, float]) -> None:
    logits = random_logits(8)
    draws = [draw(row=row, seed=row, **cut) for row in range(8)]  # type: ignore[arg-type]
    assert torch.equal(sample(logits, draws), logits.argmax(dim=-1))


def test_a_draw_never_leaves_the_mask() -> None:
    logits = random_logits(1).expand(300, -1)
    kept = tokens_of(keep_mask(logits[0].double() / 2.0, top_k=9, top_p=0.8))
    draws = [draw(row=row, position=row, temperature=2.0, top_k=9, top_p=0.8) for row in range(300)]
    assert set(sample(logits, draws).tolist()) == kept


@pytest.mark.parametrize("row", [0, 3, 7])
def test_a_seeded_draw_is_the_same_alone_and_in_any_row_of_a_batch(row: int) -> None:
    others, own = random_logits(8, seed=1), random_logits(1, seed=2)
    how = {"seed": 2**63 - 1, "temperature": 0.8, "top_p": 0.95, "top_k": 40}
    batch = torch.cat([others[:row], own, others[row:]])
    for position in range(20):
        alone = sample(own, [draw(position=position, **how)])  # type: ignore[arg-type]
        draws = [draw(row=other, seed=other, position=position) for other in range(9) if other != row]
        together = sample(batch, [draw(row=row, position=position, **how), *draws])  # type: ignore[arg-type]
        assert together[row] == alone[0]


def test_another_seed_or_position_is_another_draw() -> None:
    flat = torch.zeros(200, 1000)
    by_seed = sample(flat, [draw(row=row, seed=row) for row in range(200)])
    by_position = sample(flat, [draw(row=row, position=row) for row in range(200)])
    assert len(set(by_seed.tolist())) > 150
    assert len(set(by_position.tolist())) > 150


def test_noise_of_neighbouring_positions_does_not_overlap() -> None:
    """The counter of a position is out of reach of the draws of the one before."""
    values = {float(v) for position in range(4) for v in gumbel_noise(seed=3, position=position, size=2000)}
    assert len(values) == 4 * 2000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(temperature: float) -> None:
    """Chi-square of 4,000 draws over 8 tokens: 7 degrees of freedom, below 24.3 in 999 of 1,000 cases."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, 1.2])
    count = 4000
    draws = [draw(row=row, seed=row // 100, position=row % 100, temperature=temperature) for row in range(count)]
    drawn = sample(logits.expand(count, -1), draws)
    expected = (logits.double() / temperature).softmax(dim=-1).numpy() * count
    observed = np.bincount(drawn.numpy(), minlength=8)
    assert ((observed - expected) ** 2 / expected).sum() < 24.3


def test_log_probabilities_are_of_the_unmodified_distribution() -> None:
    logits = random_logits(5)
    tokens = torch.tensor([0, 7, 49, 7, 3])
    expected = logits.log_softmax(dim=-1)[torch.arange(5), tokens]
    torch.testing.assert_close(chosen_logprobs(logits, tokens), expected)
